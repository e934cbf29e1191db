"""The individuals that have been measured, what is known of each, and the front of them."""

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
"""Standard errors of a paired difference beyond which nothing is in doubt."""
Values = Mapping[str, float]
"""Name of an objective -> value."""


@dataclass(frozen=True)
class Individual:
    """A point of the search space and what was measured of it.

    Whoever is dominated beyond doubt after a part of the windows is given up, and never enters the front.

    Attributes:
        genome: Its numbers.
        measured: What text said of it.
        values: Every objective.
        complete: It has read all windows; else it was given up.
        generation: In which it was measured.
        predicted: What the surrogate expected of its loss before, nats, and the standard deviation.
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
        space: What they are of.
        costs: Counts what is not measured.
        reference: What the pretrained model says of the same windows.
        objectives: What is looked for.
        limits: The most that objectives may be.
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
        """Take an individual in."""
        complete = measured.windows >= self.reference.windows
        values = self.values(genome, measured)
        self.found[genome] = Individual(genome, measured, values, complete, generation, predicted)

    def values(self, genome: tuple[int, ...], measured: Measured) -> Values:
        """Every objective of an individual, by what some windows say."""
        kept = np.mean(np.array(measured.kept), axis=0)
        counted = self._costs.of(self._space.variant(np.array(genome)), kept)
        loss = float(np.mean(self.differences(measured)))
        return {PERPLEXITY.name: math.expm1(loss), DIVERGENCE.name: float(np.mean(measured.divergences)), **counted}

    def differences(self, measured: Measured) -> np.ndarray:
        """Loss of each window over that of the pretrained model, nats."""
        found: np.ndarray = np.array(measured.losses) - np.array(self.reference.losses[: measured.windows])
        return found

    def within(self, values: Values) -> bool:
        """Whether all limits are met."""
        return all(values[item.name] <= limit for item, limit in self.limits.items())

    def row(self, values: Values) -> tuple[float, ...]:
        """The values of the objectives, in their order."""
        return tuple(values[item.name] for item in self.objectives)

    @property
    def complete(self) -> list[Individual]:
        """Those that have read all windows."""
        return [item for item in self.found.values() if item.complete]

    @property
    def front(self) -> list[Individual]:
        """Those within the limits that no other dominates, by falling last objective; of equals the first."""
        inside = [item for item in self.complete if self.within(item.values)]
        rows = {self.row(item.values): item for item in reversed(inside)}
        kept = [row for row in rows if not any(dominates(other, row) for other in rows)]
        return [rows[row] for row in sorted(kept)]

    def nearest(self) -> Individual | None:
        """The individual that misses the limits by the least, relative to them."""
        return min(self.found.values(), key=lambda item: (self.missed(item.values), item.genome), default=None)

    def missed(self, values: Values) -> float:
        """By how much limits are missed, relative to them."""
        return sum(max(0.0, values[item.name] / max(limit, 1e-30) - 1) for item, limit in self.limits.items())

    def hopeless(self, genome: tuple[int, ...], measured: Measured) -> bool:
        """Whether the windows read so far leave no doubt that an individual is dominated, or breaks a limit."""
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
