"""The measured individuals, their objective values and their Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moec.compiler.search.costs import Costs
from moec.compiler.search.objectives import DIVERGENCE, PERPLEXITY, Objective, dominates
from moec.compiler.search.space import Space
from moec.compiler.search.store import Measured

DOUBT = 3.0
"""Number of standard errors beyond which a paired difference counts as certain."""
Values = Mapping[str, float]
"""Name of an objective -> value."""


@dataclass(frozen=True)
class Individual:
    """A measured point of the search space.

    An individual that is certainly dominated after some of the windows is not measured further and never enters the
    front.

    Attributes:
        genome: Its integers.
        measured: Losses and divergences by window.
        values: Value of every objective.
        complete: Whether all windows were measured.
        generation: The generation in which it was measured.
        predicted: Mean and standard deviation of the loss that the surrogate predicted before, nats.
    """

    genome: tuple[int, ...]
    measured: Measured
    values: Values
    complete: bool
    generation: int = 0
    predicted: tuple[float, float] | None = None


class Archive:
    """Measured individuals by genome.

    Args:
        space: The search space.
        costs: Computes the objectives that are not measured.
        reference: The pretrained model, measured on the same windows.
        objectives: The objectives to minimize.
        limits: Upper limits of objectives.
    """

    def __init__(
        self,
        space: Space,
        costs: Costs,
        reference: Measured,
        objectives: Sequence[Objective],
        limits: Mapping[Objective, float],
    ) -> None:
        self._space, self._costs, self.reference = space, costs, reference
        self.objectives, self.limits = tuple(objectives), dict(limits)
        self.found: dict[tuple[int, ...], Individual] = {}
        self.failed: set[tuple[int, ...]] = set()

    def add(
        self, genome: tuple[int, ...], measured: Measured, generation: int, predicted: tuple[float, float] | None
    ) -> None:
        """Add a measured individual."""
        complete = measured.windows >= self.reference.windows
        values = self.values(genome, measured)
        self.found[genome] = Individual(genome, measured, values, complete, generation, predicted)

    def values(self, genome: tuple[int, ...], measured: Measured) -> Values:
        """Value of every objective, from the windows measured so far."""
        kept = np.mean(np.array(measured.kept), axis=0)
        counted = self._costs.of(self._space.variant(np.array(genome)), kept)
        loss = float(np.mean(self.differences(measured)))
        return {PERPLEXITY.name: math.expm1(loss), DIVERGENCE.name: float(np.mean(measured.divergences)), **counted}

    def differences(self, measured: Measured) -> np.ndarray:
        """Loss of each window minus that of the pretrained model, nats."""
        found: np.ndarray = np.array(measured.losses) - np.array(self.reference.losses[: measured.windows])
        return found

    def within(self, values: Values) -> bool:
        """Whether the values meet all limits."""
        return all(values[item.name] <= limit for item, limit in self.limits.items())

    def row(self, values: Values) -> tuple[float, ...]:
        """The values of the objectives, in their order."""
        return tuple(values[item.name] for item in self.objectives)

    @property
    def complete(self) -> list[Individual]:
        """The individuals that were measured on all windows."""
        return [item for item in self.found.values() if item.complete]

    @property
    def front(self) -> list[Individual]:
        """The non-dominated individuals within the limits, sorted by their objectives; of equal ones the first."""
        inside = [item for item in self.complete if self.within(item.values)]
        rows = {self.row(item.values): item for item in reversed(inside)}
        kept = [row for row in rows if not any(dominates(other, row) for other in rows)]
        return [rows[row] for row in sorted(kept)]

    def nearest(self) -> Individual | None:
        """The individual that misses the limits by the least, relative to them."""
        return min(self.found.values(), key=lambda item: (self.missed(item.values), item.genome), default=None)

    def missed(self, values: Values) -> float:
        """The sum of the excesses over the limits, relative to each limit."""
        return sum(max(0.0, values[item.name] / max(limit, 1e-30) - 1) for item, limit in self.limits.items())

    def hopeless(self, genome: tuple[int, ...], measured: Measured) -> bool:
        """Whether an individual is certainly dominated or beyond a limit, judged by the windows so far."""
        values = self.values(genome, measured)
        differences = self.differences(measured)
        if PERPLEXITY in self.limits and _surely_above(differences, math.log1p(self.limits[PERPLEXITY])):
            return True
        if DIVERGENCE in self.limits and _surely_above(np.array(measured.divergences), self.limits[DIVERGENCE]):
            return True
        return any(self._beats(other, values, measured) for other in self.front)

    def _beats(self, other: Individual, values: Values, measured: Measured) -> bool:
        if any(other.values[item.name] > values[item.name] for item in self.objectives if not item.by_running):
            return False
        first = other.measured.first(measured.windows)
        measures: dict[Objective, Callable[[Measured], tuple[float, ...]]] = {
            PERPLEXITY: lambda found: found.losses,
            DIVERGENCE: lambda found: found.divergences,
        }
        run = [item for item in self.objectives if item.by_running]
        return all(
            _surely_above(np.array(measures[item](measured)) - np.array(measures[item](first)), 0.0) for item in run
        )


def _surely_above(differences: np.ndarray, bound: float) -> bool:
    if len(differences) < 2:
        return False
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return float(differences.mean()) - DOUBT * error > bound
