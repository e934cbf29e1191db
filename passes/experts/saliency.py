"""Importance of each expert, for expert pruning: pure functions of the routing recorded over calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.compiler.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def reap_saliency(indices: Tensor, weights: Tensor, output_norms: Tensor, num_experts: int) -> Tensor:
    """Router-weighted expert activation saliency (REAP, arXiv:2510.13999) of one MoE layer.

    S_e = mean over the tokens routed to e of w_e(x) * ||f_e(x)||_2. Sums are computed in float64, so that they
    hardly depend on the order of the tokens.

    Args:
        indices: [T, k] integers, the expert of each slot.
        weights: [T, k], the routing weights; slots of weight 0 do not count.
        output_norms: [T, k], the L2 norm of each expert's output before the weight is applied.
        num_experts: Number of experts in the layer.

    Returns:
        [E] float64; 0 for an expert that no token reached.

    Raises:
        UsageError: The shapes differ, or an index is not that of an expert.
    """
    if not indices.shape == weights.shape == output_norms.shape:
        raise UsageError(
            f"saliency needs equal shapes: indices {tuple(indices.shape)}, weights {tuple(weights.shape)}, "
            f"output norms {tuple(output_norms.shape)}"
        )
    flat = indices.reshape(-1).to(torch.int64)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < num_experts:
        raise UsageError(f"the routing names expert {int(flat.max())}, but the layer has {num_experts} experts")
    routed = weights.reshape(-1) > 0
    # The norm of a dropped slot may be NaN, so it must be masked before multiplying.
    weighted = (weights.double() * output_norms.double()).reshape(-1)[routed]
    tokens = torch.bincount(flat[routed], minlength=num_experts)
    sums = torch.zeros(num_experts, dtype=torch.float64).index_add_(0, flat[routed], weighted)
    return sums / tokens.clamp(min=1)


def super_experts(
    peaks: Sequence[Tensor], *, quantile: float = 0.995, fraction: float = 0.1
) -> tuple[tuple[int, int], ...]:
    """Experts with extreme activations, which must never be pruned (super experts, arXiv:2507.23279).

    An expert is a super expert if the largest magnitude of its down_proj output over calibration text exceeds both the
    given quantile over the experts of all layers and the given fraction of the largest of all.

    Args:
        peaks: Per MoE layer [E], the largest absolute value in each expert's down_proj output.
        quantile: Quantile of the peaks of all experts, in [0, 1].
        fraction: Fraction of the largest peak, in [0, 1].

    Returns:
        (layer, expert) pairs in ascending order.

    Raises:
        UsageError: A peak is not finite, or quantile or fraction is outside [0, 1].
    """
    if not (0 <= quantile <= 1 and 0 <= fraction <= 1):
        raise UsageError(f"quantile {quantile} and fraction {fraction} must lie in [0, 1]")
    if not peaks:
        return ()
    every = torch.cat([layer.reshape(-1).double() for layer in peaks])
    if not bool(torch.isfinite(every).all()):
        raise UsageError("an expert's output over calibration text is not finite")
    bound = max(float(every.quantile(quantile)), fraction * float(every.max()))
    return tuple(
        (number, int(expert)) for number, layer in enumerate(peaks) for expert in (layer.double() > bound).nonzero()
    )
