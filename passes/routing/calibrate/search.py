"""Search for the largest saving within a bound on the quality loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.passes.routing.policies.base import Policy


@dataclass(frozen=True)
class Saving:
    """Result of the search.

    Attributes:
        policy: The policy, or None if no saving is within the bound.
        budget: Share of slots that the policy keeps over calibration text; 1 without a policy.
        tried: Every evaluated budget with its loss, in the order of the search.
    """

    policy: Policy | None
    budget: float
    tried: tuple[tuple[float, float], ...]


def largest_saving(
    build: Callable[[float], Policy],
    evaluate: Callable[[Policy], float],
    max_loss: float,
    *,
    least: float,
    evaluations: int = 7,
) -> Saving:
    """Search for the smallest budget whose quality loss is within a bound.

    The loss is assumed to grow as the budget falls. The first evaluation is at the least budget, the others bisect
    between it and 1. With n evaluations, the budget is found to a precision of (1 - least) / 2^(n - 1).

    Args:
        build: Makes the policy for a budget, such as `fit` with its other arguments bound.
        evaluate: Measures the quality loss of a policy, such as the relative increase of perplexity.
        max_loss: Maximum loss, in the unit of `evaluate`.
        least: The smallest budget to try; it must be reachable.
        evaluations: Number of calls of `evaluate`, at least 1.

    Raises:
            UsageError: `least`, `max_loss` or `evaluations` is out of range.
    """
    if not 0 < least < 1 or evaluations < 1 or max_loss < 0:
        raise UsageError(
            f"cannot search with a least budget of {least}, {evaluations} evaluations and a quality loss of {max_loss}",
            hint="the least budget must be between 0 and 1, and the loss at least 0",
        )
    best: tuple[Policy | None, float] = (None, 1.0)
    tried: list[tuple[float, float]] = []
    budget, low, high = least, least, 1.0
    for _ in range(evaluations):
        candidate = build(budget)
        loss = evaluate(candidate)
        tried.append((budget, loss))
        if loss <= max_loss:
            best, high = (candidate, budget), budget
        else:
            low = budget
        if high <= low:
            break
        budget = (low + high) / 2
    return Saving(*best, tuple(tried))
