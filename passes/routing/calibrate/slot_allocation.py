"""Exact allocation of a budget of slots to layers, by dynamic programming."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def allocate(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], limit: int) -> tuple[int, ...]:
    """Choose one option per layer, with the least sum of losses for a sum of costs of at most `limit`.

    Alloc-MoE (arXiv:2604.08133) allocates expert activations in this way. The result is exact for losses that add up
    over layers; the time is layers x limit x options. Among equal losses, the cheaper choice wins, then the one with
    the smaller options in the first layers, so that the result is deterministic.

    Args:
        losses: [layers][options], the loss increase of each option.
        costs: [layers][options], the cost of each option: an integer of at least 0.
        limit: Maximum sum of the costs.

    Returns:
        The chosen option of each layer.

    Raises:
        UsageError: Even the cheapest options cost more than the limit.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer_losses, layer_costs in zip(losses, costs, strict=True):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (loss, chosen) in best.items():
            for option, (extra, cost) in enumerate(zip(layer_losses, layer_costs, strict=True)):
                candidate = (loss + extra, (*chosen, option))
                total = spent + cost
                if total <= limit and (total not in reached or candidate < reached[total]):
                    reached[total] = candidate
        best = _undominated(reached)
    if not best:
        least = sum(min(row) for row in costs)
        raise UsageError(
            f"the budget allows {limit} units, but the layers need at least {least}",
            hint="every token keeps at least one expert in every layer: raise the budget",
        )
    return min((loss, cost, chosen) for cost, (loss, chosen) in best.items())[2]


def _undominated(
    reached: dict[int, tuple[float, tuple[int, ...]]],
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Drop entries that cost at least as much as another entry whose loss is no larger."""
    front: dict[int, tuple[float, tuple[int, ...]]] = {}
    least = float("inf")
    for cost in sorted(reached):
        if reached[cost][0] < least:
            front[cost] = reached[cost]
            least = reached[cost][0]
    return front


def layer_ks(k_loss: Sequence[Sequence[float]], budget: float) -> tuple[int, ...]:
    """The k of each layer with the least sum of losses that keeps at most the share `budget` of all slots.

    Args:
        k_loss: [layers][k], the loss increase with k = 1, 2, ..., pretrained k in that layer alone.
        budget: Share of slots to keep.

    Raises:
        UsageError: The budget is below one slot per layer.
    """
    costs = [range(1, len(row) + 1) for row in k_loss]
    # 0.75 * 16 must allow 12 slots, even if the product is rounded down.
    limit = int(budget * sum(len(row) for row in k_loss) + 1e-9)
    return tuple(option + 1 for option in allocate(k_loss, costs, limit))
