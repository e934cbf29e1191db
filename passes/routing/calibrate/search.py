"""The largest saving that a bound on the quality loss allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.passes.routing.policies.base import Policy


@dataclass(frozen=True)
class Saving:
    """What the search found.

    Attributes:
        policy: The policy, or None where no saving stays within the bound.
        budget: Share of slots that it keeps over calibration text; 1 without a policy.
        tried: Every budget with its loss, in the order of the search.
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
    """Searches the smallest budget whose quality loss stays within a bound.

    The loss is taken to grow as the budget falls; the first evaluation is the least budget, the others bisect
    between it and no saving at all, so their number is fixed and the budget is found to (1 - least) / 2^(n - 1).

    Args:
        build: Makes the policy of a budget, such as a `fit` with its other arguments bound.
        evaluate: Measures the quality loss of a policy, for instance the relative increase of perplexity.
        max_loss: The largest loss allowed, in the unit of `evaluate`.
        least: The smallest budget worth trying; it must be reachable.
        evaluations: Calls of `evaluate`, at least 1.

    Raises:
        UsageError: `least`, `max_loss` or `evaluations` make no sense.
    """
    if not 0 < least < 1 or evaluations < 1 or max_loss < 0:
        raise UsageError(
            f"no search with least budget {least}, {evaluations} evaluations and a quality loss of {max_loss}",
            hint="The least budget lies between 0 and 1, the loss is at least 0.",
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
