"""The search: pymoo evolves a population, a surrogate predicts its losses, and promising individuals are measured.

Selection is by NSGA-II for two or three objectives (Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm",
2002) and by NSGA-III for more (Deb and Jain, 2014). Each generation measures the individuals that would add most to the
hypervolume of the front at the optimistic end of their predictions. All random choices depend on the seed, and results
do not depend on the number of workers, so a repeated search takes the same course.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.compiler.common.errors import MissingExtraError
from moec.compiler.search.archive import Archive, Individual
from moec.compiler.search.costs import Costs
from moec.compiler.search.objectives import DIVERGENCE, PERPLEXITY
from moec.compiler.search.sensitivity import Sensitivities
from moec.compiler.search.space import Genome, Space
from moec.compiler.search.store import Measured
from moec.compiler.search.surrogate import Surrogate
from moec.compiler.search.volume import Volume

try:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.core.termination import NoTermination
    from pymoo.problems.static import StaticProblem
    from pymoo.util.ref_dirs import get_reference_directions

    from moec.compiler.search.course import Course
    from moec.compiler.search.operators import Change, Excess, LayerCrossover, Moves, Within
except ImportError as error:  # pragma: no cover - says which extra is missing
    raise MissingExtraError(
        "moec search needs pymoo, which is not installed", hint="pip install 'moec[search]'"
    ) from error

OPTIMISM = 1.0
"""Standard deviations that are subtracted from a predicted loss when individuals are chosen for measurement."""
TAILS = 0.8
"""Share of a generation that differs from measured individuals in its last layers alone, so that it costs less."""
LATELY = 0.75
"""Share of these whose parent was measured lately."""
THRIFT = 2.0
"""Exponent of the price that a contribution to the front is divided by. Above 1, since a contribution is a hope and the
price is known."""
SCREENED = 4
"""Children that are proposed for each that becomes an individual; a prediction costs next to nothing."""
REFIT_EVERY = 4
"""Number of generations between fits of the surrogate's kernel."""
WORST: Mapping[str, float] = {PERPLEXITY.name: 0.1, DIVERGENCE.name: 0.1}
"""Largest values of interest, unless a limit is given."""
Key = tuple[int, ...]
Measure = Callable[[Sequence[Key], Callable[[Key, Measured], bool]], Mapping[Key, Measured]]
"""Measures individuals; stops measuring one when the function returns True for its measurements; see `session`."""


@dataclass(frozen=True)
class Generation:
    """Progress after a generation.

    Attributes:
        number: Number of the generation; 0 is the initial population.
        individuals: Distinct individuals so far.
        measured: Individuals measured on text so far.
        volume: Hypervolume of the measured front.
        front: Size of the measured front.
    """

    number: int
    individuals: int
    measured: int
    volume: float
    front: int


@dataclass(frozen=True, eq=False)
class _Hoped:
    """The optimistic end of the predictions for some individuals.

    Attributes:
        rows: Objectives: [n, m].
        within: Whether each may meet the limits.
        unsure: Standard deviation of each predicted loss: [n].
    """

    rows: np.ndarray
    within: list[bool]
    unsure: np.ndarray


class Search:
    """A search over one search space.

    Args:
        space: The search space.
        costs: Computes the objectives that are not measured.
        archive: Holds the measured individuals, the objectives and the limits.
        sensitivities: Measured sensitivity of every gene.
        course: Tells what a measurement costs, given the earlier ones.
        measure: See `Measure`.
        population: Individuals per generation.
        share: Largest share of all individuals that is measured.
        seed: Seed of the random number generators.
    """

    def __init__(
        self,
        space: Space,
        costs: Costs,
        archive: Archive,
        sensitivities: Sensitivities,
        course: Course,
        measure: Measure,
        *,
        population: int,
        share: float,
        seed: int,
    ) -> None:
        self.space, self.costs, self.archive, self.sensitivities = space, costs, archive, sensitivities
        self._measure, self._population, self._share, self._course = measure, population, share, course
        self._random = np.random.default_rng([seed, 1])
        moves = Moves(space, sensitivities)
        excess = Excess(space, costs, archive.limits)
        self._moves, self._excess = moves, excess
        self.worst = self._worst()
        self.volume = Volume(self.worst)
        self.seen: dict[Key, None] = {}
        self.generations: list[Generation] = []
        self._theta: np.ndarray | None = None
        self._loss = self._divergence = None  # type: Surrogate | None
        self._problem = _Problem(space, len(archive.objectives))
        self._algorithm = self._made(seed, LayerCrossover(space), Change(moves), Within(moves, excess))

    def _made(self, seed: int, crossover: Any, mutation: Any, repair: Any) -> Any:
        objectives = len(self.archive.objectives)
        common = {
            "pop_size": self._population,
            "n_offsprings": self._population - math.floor(TAILS * self._population),
            "crossover": crossover,
            "mutation": mutation,
            "repair": repair,
            "eliminate_duplicates": True,
            "sampling": np.zeros((0, len(self.space.genes))),
        }
        if objectives <= 3:
            algorithm = NSGA2(**common)
        else:
            algorithm = NSGA3(ref_dirs=_directions(objectives, self._population), **common)
        algorithm.setup(self._problem, termination=NoTermination(), seed=seed)
        return algorithm

    def _worst(self) -> list[float]:
        """The reference point of the hypervolume: costs of the pretrained model, and the largest losses of interest."""
        layers = np.ones(len(self.space.slots))
        counted = self.costs.of(self.space.variant(self.space.unchanged), layers)
        limits = {item.name: limit for item, limit in self.archive.limits.items() if limit > 0}
        # Slightly beyond the pretrained model, so that it has a hypervolume of its own.
        whole = {name: 1.01 * value for name, value in counted.items()}
        return [
            limits.get(item.name, WORST.get(item.name, whole.get(item.name, 1.0))) for item in self.archive.objectives
        ]

    def start(self, seeds: Sequence[Genome]) -> None:
        """Measure the initial individuals and fill the population with mutations of them."""
        known = dict.fromkeys(self._key(self._moves.repaired(genome, self._excess)) for genome in seeds)
        self._take(list(known), 0)
        self._fit(refit=True)
        first = list(known)[: self._population]
        tries = 0
        while len(first) < self._population and tries < 50 * self._population:
            parent = np.array(list(known)[int(self._random.integers(len(known)))])
            for _ in range(int(self._random.integers(1, 5))):
                parent = self._moves.change(parent, self._random)
            key = self._key(self._moves.repaired(parent, self._excess))
            tries += 1
            if key not in first:
                first.append(key)
        self.seen |= dict.fromkeys(first)
        self._algorithm.initialization.sampling = np.array(first)
        self._algorithm.pop_size = len(first)
        population = self._algorithm.ask()
        self._measure_some(population)
        self._judge(population)
        self._algorithm.tell(infills=population)
        self._tell(0)

    def step(self) -> bool:
        """Run one generation; False if there are no new individuals."""
        number = len(self.generations)
        self._judge(self._algorithm.pop)
        population = self._algorithm.ask()
        if population is None or not len(population):
            return False
        population = Population.merge(population, Population.new("X", self._tails()))
        population.set("X", np.array([self.space.canonical(row) for row in population.get("X")]))
        self.seen |= dict.fromkeys(self._key(row) for row in population.get("X"))
        self._measure_some(population)
        self._fit(refit=number % REFIT_EVERY == 0)
        self._judge(population)
        self._judge(self._algorithm.pop)
        self._algorithm.tell(infills=population)
        self._tell(number)
        return True

    def _tails(self) -> np.ndarray:
        """Children of the front, or of all that were measured, that differ from a parent in its last layers alone.

        Most parents were measured lately, as later measurements resume from their states.
        """
        parents = [np.array(item.genome) for item in self.archive.front or self.archive.complete]
        listed = {tuple(parent.tolist()) for parent in parents}
        recent = [np.array(key) for key in self._course.recent if key in listed] or parents
        known = {*self.seen, *map(self._key, self._algorithm.pop.get("X"))}
        found: dict[Key, None] = {}
        wanted = math.floor(TAILS * self._population)
        for _ in range(4 * SCREENED * self._population if parents else 0):
            if len(found) >= SCREENED * wanted:
                break
            near = recent if self._random.random() < LATELY else parents
            parent, other = (each[int(self._random.integers(len(each)))] for each in (near, parents))
            child = self._course.child(parent, other, self._moves, self._random)
            key = self._key(self._moves.repaired(child, self._excess))
            if key not in known:
                found[key] = None
        return np.array(self._screened(list(found), wanted), dtype=np.int64).reshape(-1, len(self.space.genes))

    def _screened(self, keys: list[Key], wanted: int) -> list[Key]:
        """The children that promise most, then the first of the others, until there are as many as wanted."""
        if len(keys) <= wanted:
            return keys
        best = [keys[index] for index in self._promising(keys, self._hoped(keys), wanted)]
        return list(dict.fromkeys([*best, *keys]))[:wanted]

    def _key(self, row: Any) -> Key:
        return tuple(int(value) for value in self.space.canonical(np.asarray(row)))

    @property
    def allowed(self) -> int:
        """Number of individuals that may have been measured by now."""
        return math.floor(self._share * len(self.seen))

    def _measure_some(self, population: Any) -> None:
        """Measure the individuals that would add most to the front at the optimistic end of their predictions."""
        pool = dict.fromkeys(map(self._key, population.get("X")))
        if self._algorithm.pop is not None and len(self._algorithm.pop):
            pool |= dict.fromkeys(map(self._key, self._algorithm.pop.get("X")))
        fresh = [key for key in pool if key not in self.archive.found and key not in self.archive.failed]
        count = min(self.allowed - len(self.archive.found), len(fresh))
        if count <= 0:
            return
        hoped = self._hoped(fresh)
        chosen = self._promising(fresh, hoped, count)
        # Some of the remaining measurements go to the most uncertain individuals.
        rest = sorted(
            (index for index in range(len(fresh)) if index not in chosen), key=lambda index: -hoped.unsure[index]
        )
        chosen += rest[: max(0, min(count - len(chosen), count // 4))]
        self._take([fresh[index] for index in chosen], len(self.generations))

    def _promising(self, keys: Sequence[Key], hoped: _Hoped, count: int) -> list[int]:
        """Indices of the individuals that would add most to the front for their price, if all goes well."""
        candidates = [index for index in range(len(keys)) if hoped.within[index]]
        front = np.array([self.archive.row(item.values) for item in self.archive.front])
        prices = [self._course.price(keys[index]) ** THRIFT for index in candidates]
        return [candidates[index] for index, _ in self.volume.best(front, hoped.rows[candidates], count, prices)]

    def _take(self, keys: Sequence[Key], generation: int) -> None:
        """Measure individuals and record the prediction made for each before."""
        fresh = [key for key in keys if key not in self.archive.found]
        expected: dict[Key, tuple[float, float] | None] = dict.fromkeys(fresh)
        if self._loss is not None and fresh:
            means, deviations = self._loss.predict(self._roots(fresh))
            expected |= {key: (float(m), float(d)) for key, m, d in zip(fresh, means, deviations, strict=True)}
        self.seen |= dict.fromkeys(fresh)
        measured = self._measure(fresh, self.archive.hopeless)
        for key in fresh:
            if key in measured:
                self.archive.add(key, measured[key], generation, expected[key])
                self._course.record(key)
            else:
                self.archive.failed.add(key)

    def _fit(self, *, refit: bool) -> None:
        known = list(self.archive.found.values())
        if not known:
            return
        roots = self._roots([item.genome for item in known])
        losses, divergences, variances = [], [], []
        for item in known:
            differences = self.archive.differences(item.measured)
            losses.append(float(differences.mean()))
            divergences.append(item.values[DIVERGENCE.name])
            short = not item.complete and len(differences) > 1
            variances.append(float(differences.var(ddof=1)) / len(differences) if short else 0.0)
        spread = np.array(variances)
        classes = self.sensitivities.classes
        self._loss = Surrogate(roots, np.array(losses), spread, self._theta, refit=refit, classes=classes)
        self._theta = self._loss.theta
        self._divergence = Surrogate(roots, np.array(divergences), spread, self._theta, refit=False, classes=classes)

    def _roots(self, keys: Sequence[Key]) -> np.ndarray:
        return np.array([self.sensitivities.roots(np.array(key)) for key in keys])

    def _counted(self, key: Key) -> dict[str, float]:
        genome = np.array(key)
        return self.costs.of(self.space.variant(genome), self.space.kept(genome))

    def _hoped(self, keys: Sequence[Key]) -> _Hoped:
        means, deviations = self._predicted(keys)
        rows, within = [], []
        for index, key in enumerate(keys):
            values = {
                **self._counted(key),
                **{name: means[name][index] - OPTIMISM * deviations[name][index] for name in means},
            }
            rows.append(self.archive.row(values))
            within.append(self.archive.within(values))
        return _Hoped(np.array(rows), within, deviations[PERPLEXITY.name])

    def _predicted(self, keys: Sequence[Key]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        roots = self._roots(keys)
        assert self._loss is not None
        assert self._divergence is not None
        loss, loss_deviation = self._loss.predict(roots)
        divergence, divergence_deviation = self._divergence.predict(roots)
        means = {PERPLEXITY.name: np.expm1(loss), DIVERGENCE.name: divergence}
        return means, {PERPLEXITY.name: loss_deviation, DIVERGENCE.name: divergence_deviation}

    def _judge(self, population: Any) -> None:
        """Set the objectives of a population: measured values where they exist, predictions otherwise."""
        keys = [self._key(row) for row in population.get("X")]
        means, _ = self._predicted(keys)
        rows, excess = [], []
        for index, key in enumerate(keys):
            found: Individual | None = self.archive.found.get(key)
            known: Mapping[str, float] = (
                found.values if found else {**self._counted(key), **{name: means[name][index] for name in means}}
            )
            row = self.archive.row(known)
            rows.append(row)
            # The region beyond the reference point is treated like the region beyond a limit.
            beyond = sum(max(0.0, value / worst - 1) for value, worst in zip(row, self.worst, strict=True))
            excess.append([self.archive.missed(known) + beyond])
        Evaluator(skip_already_evaluated=False).eval(
            StaticProblem(self._problem, F=np.array(rows), G=np.array(excess)), population
        )

    def _tell(self, number: int) -> None:
        front = self.archive.front
        volume = self.volume.of(np.array([self.archive.row(item.values) for item in front]))
        self.generations.append(Generation(number, len(self.seen), len(self.archive.found), volume, len(front)))


class _Problem(Problem):  # type: ignore[misc]
    """The bounds of the genes; objectives are computed outside of pymoo."""

    def __init__(self, space: Space, objectives: int) -> None:
        super().__init__(
            n_var=len(space.genes), n_obj=objectives, n_ieq_constr=1, xl=space.low, xu=space.high, vtype=int
        )


def _directions(objectives: int, population: int) -> Any:
    """Das and Dennis' reference directions, at most as many as the population has individuals."""
    partitions = 1
    while math.comb(objectives + partitions, partitions + 1) <= population:
        partitions += 1
    return get_reference_directions("das-dennis", objectives, n_partitions=partitions)
