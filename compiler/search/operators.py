"""Mutation, crossover and repair operators for pymoo.

Mutations are small steps, swaps between layers, and moves of slots or bytes from the least to the most sensitive
layer. Crossover exchanges whole layers. Repair meets the limits that can be computed without running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation
from pymoo.core.repair import Repair

from moec.compiler.search.costs import Costs
from moec.compiler.search.objectives import Objective
from moec.compiler.search.sensitivity import Sensitivities
from moec.compiler.search.space import Genome, Space

Random = np.random.Generator
STEPS: Mapping[str, int] = {"level": 12, "prune": 3, "format": 2}
"""Kind of a gene -> largest step of a mutation."""
REPAIRS = 400
"""Maximum number of steps of a repair."""


class Moves:
    """Elementary changes of individuals."""

    def __init__(self, space: Space, sensitivities: Sensitivities) -> None:
        self._space, self._sensitivities = space, sensitivities
        self._levels = [place for place, gene in enumerate(space.genes) if gene.kind == "level"]
        self._formats = [place for place, gene in enumerate(space.genes) if gene.kind == "format"]

    def change(self, genome: Genome, random: Random) -> Genome:
        """Apply one change of a random kind."""
        kinds: list[Callable[[Genome, Random], Genome]] = [self.step, self.step]
        if len(self._levels) > 1:
            kinds += [self.swap, self.move_slots]
        if len(self._formats) > 1:
            kinds.append(self.move_bytes)
        return self._space.canonical(kinds[int(random.integers(len(kinds)))](genome, random))

    def step(self, genome: Genome, random: Random) -> Genome:
        """Change one to three genes by a small step; a rule is drawn at random instead."""
        found = genome.copy()
        for place in random.choice(len(genome), size=min(len(genome), int(random.integers(1, 4))), replace=False):
            gene = self._space.genes[place]
            if gene.kind == "rule":
                found[place] = random.integers(gene.low, gene.high + 1)
            else:
                by = int(random.integers(1, STEPS[gene.kind] + 1))
                found[place] += by if random.random() < 0.5 else -by
        return found

    def swap(self, genome: Genome, random: Random) -> Genome:
        """Exchange the rules and levels of two layers."""
        first, second = random.choice(self._levels, size=2, replace=False)
        found = genome.copy()
        for offset in (0, -1):  # the rule of a layer comes before its level
            found[first + offset], found[second + offset] = genome[second + offset], genome[first + offset]
        return found

    def move_slots(self, genome: Genome, random: Random) -> Genome:
        """Among a few layers, move slots from the least sensitive to the most sensitive one."""
        return self._move(genome, random, self._levels, int(random.integers(1, STEPS["level"] + 1)))

    def move_bytes(self, genome: Genome, random: Random) -> Genome:
        """Among a few parts, give the least sensitive a smaller format and the most sensitive a larger one."""
        return self._move(genome, random, self._formats, 1)

    def _move(self, genome: Genome, random: Random, places: Sequence[int], by: int) -> Genome:
        few = random.choice(places, size=min(len(places), 4), replace=False)
        gains = [self._loss(genome, place, by) for place in few]
        found = genome.copy()
        found[few[int(np.argmin(gains))]] -= by
        found[few[int(np.argmax(gains))]] += by
        return found

    def _loss(self, genome: Genome, place: int, by: int) -> float:
        """Loss that lowering a gene adds, predicted by the additive model."""
        gene = self._space.genes[place]
        lower = genome.copy()
        lower[place] = max(gene.low, genome[place] - by)
        return self._sensitivities.root(gene, lower) ** 2 - self._sensitivities.root(gene, genome) ** 2

    def repaired(self, genome: Genome, excess: Callable[[Genome], float]) -> Genome:
        """Take the steps with the least loss per unit of `excess` until it is 0 or no step reduces it."""
        found = self._space.canonical(genome)
        over = excess(found)
        for _ in range(REPAIRS):
            if over <= 0:
                break
            tried = [(self._price(found, place, over, excess), place) for place in range(len(found))]
            price, place = min(tried)
            if not np.isfinite(price):
                break
            found = self._space.canonical(self._lowered(found, place))
            over = excess(found)
        return found

    def _lowered(self, genome: Genome, place: int) -> Genome:
        """A step towards a lower cost: fewer slots, more pruned experts or a smaller format."""
        gene, found = self._space.genes[place], genome.copy()
        found[place] += {"level": -4, "format": -1, "prune": 1, "rule": 0}[gene.kind]
        return found

    def _price(self, genome: Genome, place: int, over: float, excess: Callable[[Genome], float]) -> float:
        gene = self._space.genes[place]
        lower = self._space.canonical(self._lowered(genome, place))
        gained = over - excess(lower) if gene.kind != "rule" else 0.0
        if gained <= 0:
            return np.inf
        before, after = (self._sensitivities.root(gene, each) for each in (genome, lower))
        return (after**2 - before**2) / gained


class Excess:
    """By how much an individual exceeds the limits on computed costs, relative to each limit."""

    def __init__(self, space: Space, costs: Costs, limits: Mapping[Objective, float]) -> None:
        self._space, self._costs = space, costs
        self._limits = {item: limit for item, limit in limits.items() if not item.by_running}

    def __call__(self, genome: Genome) -> float:
        """The sum of the relative excesses; 0 if all limits are met."""
        if not self._limits:
            return 0.0
        counted = self._costs.of(self._space.variant(genome), self._space.kept(genome))
        return sum(max(0.0, counted[item.name] / max(limit, 1e-30) - 1) for item, limit in self._limits.items())


class LayerCrossover(Crossover):  # type: ignore[misc]
    """Exchange whole layers of two parents: each with probability 1/2, or all after a random one."""

    def __init__(self, space: Space) -> None:
        super().__init__(2, 2)
        self._blocks = space.blocks

    def _do(self, _problem: Any, X: Any, *_: Any, random_state: Random, **__: Any) -> Any:  # noqa: N803
        found = X.copy()
        for mating in range(X.shape[1]):
            swapped = random_state.random(len(self._blocks)) < 0.5
            if random_state.random() < 0.5:
                swapped = np.arange(len(self._blocks)) >= random_state.integers(len(self._blocks) + 1)
            for block in (block for block, chosen in zip(self._blocks, swapped, strict=True) if chosen):
                found[0, mating, block], found[1, mating, block] = X[1, mating, block], X[0, mating, block]
        return found


class Change(Mutation):  # type: ignore[misc]
    """Apply `Moves.change` to every individual once or twice."""

    def __init__(self, moves: Moves) -> None:
        super().__init__()
        self._moves = moves

    def _do(self, _problem: Any, X: Any, *_: Any, random_state: Random, **__: Any) -> Any:  # noqa: N803
        found = X.copy()
        for row in range(len(X)):
            for _change in range(int(random_state.integers(1, 3))):
                found[row] = self._moves.change(found[row], random_state)
        return found


class Within(Repair):  # type: ignore[misc]
    """Apply `Moves.repaired` to every individual."""

    def __init__(self, moves: Moves, excess: Excess) -> None:
        super().__init__()
        self._moves, self._excess = moves, excess

    def _do(self, _problem: Any, X: Any, **_: Any) -> Any:  # noqa: N803
        return np.array([self._moves.repaired(row, self._excess) for row in X])
