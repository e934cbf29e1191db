"""Exact allocation of formats to tensors: the least loss within a size, or the least size within a loss.

Predicted losses add up over tensors, so this is a multiple-choice knapsack problem: choose one candidate per tensor to
minimise one sum under a limit on the other. Branch and bound (HiGHS, through `scipy.optimize.milp`) solves it exactly,
and the same candidates always give the same choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from moec.compiler.common.errors import UsageError
from moec.quantize.formats import Format

# HiGHS stops at an absolute gap of 1e-6, which scipy cannot change. With sums scaled by this, it amounts to 1e-12.
_SCALE = 1e6


@dataclass(frozen=True)
class Candidate:
    """One way to store one tensor.

    Attributes:
        format: Its format.
        bytes: Its size in bytes.
        loss: Predicted increase of the model's loss, in a unit that adds up over tensors, such as nats per token. It
            may be negative if the measurement is noisy.
    """

    format: Format
    bytes: int
    loss: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.loss) or self.bytes < 0:
            raise ValueError(f"candidate {self.format}: {self.bytes} bytes, loss {self.loss}")


@dataclass(frozen=True)
class Allocation:
    """One point of the trade-off between size and loss.

    Attributes:
        choices: The chosen candidate of each tensor, in the order of the tensors.
        bytes: Sum of their bytes.
        loss: Sum of their losses.
    """

    choices: tuple[tuple[str, Candidate], ...]
    bytes: int
    loss: float


Candidates: TypeAlias = Mapping[str, Sequence[Candidate]]
Measure: TypeAlias = Callable[[Candidate | Allocation], float]


def least_loss(candidates: Candidates, *, max_bytes: int) -> Allocation:
    """The allocation of at most `max_bytes` bytes with the least predicted loss.

    Raises:
        UsageError: Even the smallest candidates need more bytes; the hint says how many.
    """
    message = f"the tensors cannot fit into {max_bytes} bytes"
    return _solve(candidates, _loss, _bytes, max_bytes, message, "the smallest available formats take {} bytes")


def least_bytes(candidates: Candidates, *, max_loss: float) -> Allocation:
    """The smallest allocation whose predicted loss is at most `max_loss`.

    Raises:
        UsageError: Even the best candidates lose more; the hint says how much.
    """
    message = f"no choice of formats keeps the predicted loss at or below {max_loss:.6g}"
    return _solve(candidates, _bytes, _loss, max_loss, message, "the best available formats lose {:.6g}")


def trade_off(candidates: Candidates, *, points: int = 33) -> tuple[Allocation, ...]:
    """The curve of predicted loss over size, from the smallest allocation to the one with the least loss.

    Args:
        candidates: Candidates of each tensor.
        points: Number of evenly spaced sizes at which the least loss is computed, including both ends.

    Returns:
        At most `points` optimal allocations, with increasing bytes and strictly decreasing loss.
    """
    low = _cheapest(candidates, _bytes, _loss).bytes
    high = _cheapest(candidates, _loss, _bytes).bytes
    limits = sorted({low + (high - low) * step // max(points - 1, 1) for step in range(points)})
    curve: list[Allocation] = []
    for limit in limits:
        found = least_loss(candidates, max_bytes=limit)
        if not curve or found.loss < curve[-1].loss:
            curve.append(found)
    return tuple(curve)


def _bytes(chosen: Candidate | Allocation) -> float:
    return chosen.bytes


def _loss(chosen: Candidate | Allocation) -> float:
    return chosen.loss


def _allocation(choices: Mapping[str, Candidate]) -> Allocation:
    return Allocation(
        tuple(choices.items()),
        sum(candidate.bytes for candidate in choices.values()),
        math.fsum(candidate.loss for candidate in choices.values()),
    )


def _cheapest(candidates: Candidates, first: Measure, second: Measure) -> Allocation:
    """The allocation with the least sum of `first`; among equal ones, the least sum of `second`."""
    for name, offered in candidates.items():
        if not offered:
            raise ValueError(f"{name} has no candidate")
    return _allocation(
        {
            name: min(offered, key=lambda candidate: (first(candidate), second(candidate)))
            for name, offered in candidates.items()
        }
    )


def _useful(offered: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other one equals or beats in both bytes and loss, by increasing bytes."""
    kept: list[Candidate] = []
    for candidate in sorted(offered, key=lambda candidate: (candidate.bytes, candidate.loss, str(candidate.format))):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return kept


def _solve(candidates: Candidates, cost: Measure, weight: Measure, limit: float, message: str, hint: str) -> Allocation:
    """Minimise the sum of `cost` with the sum of `weight` at most `limit`.

    The solver meets the limit only up to a tolerance. Its answer is therefore checked and, if it exceeds the limit,
    solved again with a tighter one.

    Raises:
        UsageError: Even the choice with the least weight exceeds the limit; `hint` is formatted with this weight.
    """
    lightest = _cheapest(candidates, weight, cost)
    total = weight(lightest)
    if total > limit:
        raise UsageError(message, hint=hint.format(total))
    options = {name: _useful(offered) for name, offered in candidates.items()}
    tightened = limit
    while tightened > total:
        found = _branch_and_bound(options, cost, weight, tightened)
        excess = math.fsum(map(weight, (candidate for _, candidate in found.choices))) - limit
        if excess <= 0:
            return found
        tightened -= 2 * excess
    return lightest


def _branch_and_bound(
    options: Mapping[str, Sequence[Candidate]], cost: Measure, weight: Measure, limit: float
) -> Allocation:
    flat = [(row, candidate) for row, offered in enumerate(options.values()) for candidate in offered]
    rows = np.array([row for row, _ in flat])
    costs, weights = (
        np.array([measure(candidate) for _, candidate in flat], dtype=np.float64) for measure in (cost, weight)
    )
    # Shifting all costs of a tensor by a constant changes no choice, so its least cost can be 0; likewise for weights.
    for values in (costs, weights):
        least = np.full(len(options), np.inf)
        np.minimum.at(least, rows, values)
        values -= least[rows]
        if values is weights:
            limit -= math.fsum(least)
    scaled_costs, scale = costs * _factor(costs), _factor(weights)
    one_each = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(options), len(flat)))
    answer = milp(
        scaled_costs,
        integrality=np.ones(len(flat), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((weights * scale)[np.newaxis], -np.inf, limit * scale),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if answer.x is None:
        raise RuntimeError(f"HiGHS found no allocation although one exists: {answer.message}")
    chosen = [flat[index] for index in np.flatnonzero(answer.x > 0.5)]
    names = list(options)
    return _allocation({names[row]: candidate for row, candidate in chosen})


def _factor(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    total = float(values.sum())
    return _SCALE / total if total > 0 else 1.0
