"""The judge's own routing policies, after the table in `docs/routing.md`: slots are sorted, then counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Any]


def dropped(policy: str, given: Parameters, layer: int, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The routing weights that a policy leaves, 0 in slots that it drops.

    Args:
        policy: Name of the policy.
        given: Its parameters, as in a recipe.
        layer: Index of the MoE layer.
        hidden: Input of the experts, [T, H].
        indices: Expert of each slot, [T, k].
        weights: [T, k].
    """
    if policy == "per-layer":
        own = given["layers"][layer]
        if own is None:
            return weights
        scaled = given.get("renormalize", True) and own.get("renormalize", True)
        return dropped(own["policy"], {**own, "renormalize": scaled}, 0, hidden, indices, weights)
    positive = weights.double().clamp(min=0)
    order = positive.argsort(dim=-1, descending=True, stable=True)
    ranked = positive.gather(-1, order)
    kept_in_order = _kept(policy, given, layer, hidden.double(), indices.gather(-1, order), ranked)
    kept_in_order[:, 0] = True
    kept = torch.zeros_like(kept_in_order).scatter(-1, order, kept_in_order)
    left = torch.where(kept, positive, 0.0)
    if given.get("renormalize", True):
        left = left * positive.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp(min=1e-30)
    return left.to(weights.dtype)


def _kept(policy: str, given: Parameters, layer: int, hidden: Tensor, experts: Tensor, ranked: Tensor) -> Tensor:
    """Which slots of each token stay, [T, k]; `ranked` are its weights in falling order, with their `experts`."""

    def of_layer(name: str, otherwise: float) -> float:
        values = given.get(name)
        return float(values[layer]) if values else otherwise

    total, largest = ranked.sum(-1, keepdim=True), ranked[:, :1]
    rank = torch.arange(ranked.shape[1])[None].expand_as(ranked)
    match policy:
        case "top-p" | "capped":
            share = max(1 - (1 - given["mass"]) * of_layer("slack", 1), 1e-6)
            within = ranked.cumsum(-1) - ranked < share * total
            return within & (rank < of_layer("caps", ranked.shape[1]))
        case "threshold":
            unit = 1.0 if given.get("absolute") else total
            return (ranked * of_layer("importance", 1) >= given["tau"] * unit) | (ranked == largest)
        case "ratio":
            return ranked >= min(given["beta"] * of_layer("scale", 1), 1.0) * largest
        case "layer-k":
            return rank < of_layer("ks", ranked.shape[1])
        case "uniform-k":
            return rank < given["k"]
        case "random-drop":
            # A hash is defined by the arithmetic that computes it, which is single precision.
            token = hidden[:, :4].float().sum(-1, keepdim=True) * torch.tensor(61.803399)
            mixed = token + experts.float() * torch.tensor(0.6180339887)
            return mixed - mixed.floor() < given["probability"]
        case _:
            complexity = _complexity(policy, hidden, ranked)
            step = (complexity - of_layer("location", 0)) / of_layer("spread", 1)
            return rank < (given["center"] + given["gain"] * step).ceil().clamp(min=1)


def _complexity(policy: str, hidden: Tensor, ranked: Tensor) -> Tensor:
    """The figure by which a policy judges a token, [T, 1]."""
    if policy == "activation-norm":
        return hidden.square().mean(-1, keepdim=True).sqrt()
    shares = ranked / ranked.sum(-1, keepdim=True).clamp(min=1e-30)
    if policy == "entropy":
        return torch.special.entr(shares).sum(-1, keepdim=True)
    second = shares[:, 1:2] if shares.shape[1] > 1 else torch.zeros_like(shares[:, :1])
    return second - shares[:, :1]
