"""What each choice of a variant costs by itself, measured: the additive part of the surrogate.

One gene at a time is changed in the pretrained model, at a few of its values, and the divergence of the next-token
distributions is measured. It grows with the square of what the change does to the logits, so that between two measured
values its root is interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moec.compiler.search.costs import Costs
from moec.compiler.search.space import LEVELS, RULES, Gene, Genome, Space

LEVEL_SHARES = (0.0, 0.35, 0.6, 0.8)
"""Where levels are measured, from the least to all slots."""
PRUNE_SHARES = (0.25, 0.5, 1.0)
"""Where pruning is measured, of the experts of a layer that may go."""
FORMAT_SHARES = (0.0, 0.34, 0.67)
"""Where formats are measured, from the smallest to the largest."""


@dataclass(frozen=True)
class Curve:
    """Divergence of one gene by itself.

    Attributes:
        places: Where it was measured, rising: levels, experts, or bytes.
        divergences: Nats per token there.
    """

    places: tuple[float, ...]
    divergences: tuple[float, ...]

    def root(self, place: float) -> float:
        """Root of the divergence at a place."""
        return float(np.interp(place, self.places, np.sqrt(self.divergences)))


Key = tuple[str, int, int]
"""Kind and index of a gene, and for levels the rule."""


@dataclass(frozen=True)
class Probe:
    """One measurement: a curve, a place on it, and the individual that is there."""

    key: Key
    place: float
    genome: tuple[int, ...]


class Sensitivities:
    """What the genes of a space cost by themselves.

    Args:
        space: What is varied.
        costs: Tells how large formats are.
        divergences: Of each of `probes(space, costs)`, nats per token.
    """

    def __init__(self, space: Space, costs: Costs, divergences: Sequence[float]) -> None:
        self._space, self._costs = space, costs
        found: dict[Key, dict[float, float]] = {}
        for probe, value in zip(probes(space, costs), divergences, strict=True):
            found.setdefault(probe.key, {})[probe.place] = max(value, 0.0)
        for key, places in found.items():
            places[_nothing(space, costs, key)] = 0.0
        self.curves: Mapping[Key, Curve] = {
            key: Curve(tuple(sorted(places)), tuple(places[place] for place in sorted(places)))
            for key, places in found.items()
        }

    @cached_property
    def groups(self) -> tuple[Gene, ...]:
        """The genes that have a curve."""
        return tuple(gene for gene in self._space.genes if gene.kind != "rule")

    def roots(self, genome: Genome) -> np.ndarray:
        """Root of the divergence of each group by itself: [groups]."""
        return np.array([self.root(gene, genome) for gene in self.groups])

    def root(self, gene: Gene, genome: Genome) -> float:
        """Root of the divergence of one group."""
        value = self._space.value(genome, gene.kind, gene.index, 0)
        if gene.kind == "level" and value >= LEVELS:
            return 0.0
        rule = self._space.value(genome, "rule", gene.index, 0) if gene.kind == "level" else 0
        return self.curves[gene.kind, gene.index, rule].root(_place(self._space, self._costs, gene, value))


def probes(space: Space, costs: Costs) -> list[Probe]:
    """What is to be measured, in the order of the genes."""
    found: list[Probe] = []
    for gene in space.genes:
        rules = range(len(RULES)) if gene.kind == "level" else (0,)
        for rule in rules if gene.kind != "rule" else ():
            found += _probes(space, costs, gene, rule)
    return found


def _probes(space: Space, costs: Costs, gene: Gene, rule: int) -> list[Probe]:
    shares = {"level": LEVEL_SHARES, "prune": PRUNE_SHARES, "format": FORMAT_SHARES}[gene.kind]
    known: dict[tuple[int, ...], Probe] = {}
    for share in shares:
        value = gene.low + round(share * (gene.high - gene.low))
        genome = space.unchanged.copy()
        genome[space.places[gene.kind, gene.index]] = value
        if gene.kind == "level":
            genome[space.places["rule", gene.index]] = rule
        genome = space.canonical(genome)
        if not np.array_equal(genome, space.unchanged):
            value = space.value(genome, gene.kind, gene.index, 0)
            key = tuple(genome.tolist())
            known[key] = Probe((gene.kind, gene.index, rule), _place(space, costs, gene, value), key)
    return list(known.values())


def _place(space: Space, costs: Costs, gene: Gene, value: int) -> float:
    """Where a value of a gene is on its curve; formats are as fine as they are large."""
    return (
        float(costs.part_bytes(gene.index, space.formats[gene.index][value])) if gene.kind == "format" else float(value)
    )


def _nothing(space: Space, costs: Costs, key: Key) -> float:
    """Where a gene changes nothing."""
    kind, index, _ = key
    if kind == "format":
        return float(costs.part_bytes(index, space.formats[index][-1]))
    return float(LEVELS) if kind == "level" else 0.0
