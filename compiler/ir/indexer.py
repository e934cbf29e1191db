"""`moec::indexer`: selects the tokens to which sparse attention attends.

Importing this module registers the op in the namespace `torch.ops.moec`. DeepSeek-V3.2, GLM-5 and others score every
earlier token with a few narrow heads, and attend only to the tokens with the largest scores (the "lightning indexer" of
arXiv 2512.02556). The keys of these heads are a state of the kind "index_key".
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ir.ops import visible

torch.library.define(
    "moec::indexer",
    "(Tensor query, Tensor key, Tensor weights, Tensor past_key, Tensor cache_position, Tensor? attention_mask, "
    "float scale, str kind, int window, int top_k) -> (Tensor, Tensor)",
)


@torch.library.impl("moec::indexer", "CompositeExplicitAutograd")
def indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    past_key: Tensor,
    cache_position: Tensor,
    attention_mask: Tensor | None,
    scale: float,
    kind: str,
    window: int,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Select the tokens that each new token attends to.

    `score[t] = sum over heads of weights * relu(scale * query . key[t])`, in float32. A token is selected if it is
    visible and at most `top_k - 1` visible tokens have a larger score. Tokens with equal scores are selected or
    left out together, so more than `top_k` tokens may be selected. In released models scores are distinct.

    Args:
        query: [B, S, H, D], rotary embedding applied.
        key: [B, 1, S, D], shared by all heads.
        weights: Weight of each head, [B, S, H].
        past_key: [B, 1, P, D].
        cache_position: Slots of the new tokens in the cache, [S] int64.
        attention_mask: [B, P + S], 0 where the slot is padding, or None.
        scale: Factor on the products.
        kind: Kind of the mask, as in `moec.compiler.ir.ops.visible`.
        window: Size of the mask's window or chunk.
        top_k: Number of tokens to select, at least 1.

    Returns:
        `selected` [B, S, P + S] bool, and the present keys [B, 1, P + S, D].
    """
    keys = torch.cat([past_key, key], dim=2)
    allowed = visible(cache_position, keys.shape[2], attention_mask, kind, window)
    scores = token_scores(query, keys, weights, scale).masked_fill(~allowed, -torch.inf)
    threshold = scores.topk(min(top_k, scores.shape[-1])).values[..., -1:]
    return allowed & (scores >= threshold), keys


def token_scores(query: Tensor, keys: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Score of each token in `keys` [B, 1, T, D], visible or not: [B, S, T] float32; the rest as in `indexer`."""
    products = torch.matmul(query.transpose(1, 2).float(), keys.transpose(-1, -2).float()) * scale
    return (weights.transpose(1, 2).unsqueeze(-1).float() * products.relu()).sum(1)


@torch.library.register_fake("moec::indexer")  # type: ignore[untyped-decorator]
def _(
    query: Tensor,
    key: Tensor,
    weights: Tensor,  # noqa: ARG001
    past_key: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    total = past_key.shape[2] + key.shape[2]
    selected = query.new_empty(query.shape[0], query.shape[1], total, dtype=torch.bool)
    return selected, key.new_empty(key.shape[0], 1, total, key.shape[3])


INDEXER = torch.ops.moec.indexer.default
