"""Measured sensitivity of every gene: the additive part of the surrogate.

One gene of the pretrained model is changed at a time, to a few of its values, and the divergence of the next-token
distributions is measured. The divergence grows with the square of the change of the logits, so its square root is
interpolated between measured values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moec.compiler.search.costs import Costs
from moec.compiler.search.space import LEVELS, RULES, Gene, Genome, Space

LEVEL_SHARES = (0.0, 0.35, 0.6, 0.8)
"""Levels that are measured, as shares of the range from the smallest level to all slots."""
PRUNE_SHARES = (0.25, 0.5, 1.0)
"""Numbers of pruned experts that are measured, as shares of the removable experts of a layer."""
FORMAT_SHARES = (0.0, 0.34, 0.67)
"""Formats that are measured, as shares of the range from the smallest to the largest."""


@dataclass(frozen=True)
class Curve:
    """Divergence as a function of one gene, with all other genes unchanged.

    Attributes:
        places: Measured points, ascending: levels, numbers of pruned experts, or bytes.
        divergences: Divergence at each point, nats per token.
    """

    places: tuple[float, ...]
    divergences: tuple[float, ...]

    def root(self, place: float) -> float:
        """Square root of the divergence at a point, interpolated."""
        return float(np.interp(place, self.places, np.sqrt(self.divergences)))


Key = tuple[str, int, int]
"""Kind and index of a gene, and the rule if it is a level."""


@dataclass(frozen=True)
class Probe:
    """One measurement: the key of a curve, a point on it, and the individual to measure."""

    key: Key
    place: float
    genome: tuple[int, ...]


class Sensitivities:
    """The measured curves of all genes.

    Args:
        space: The search space.
        costs: Computes the bytes of formats.
        divergences: Divergence of each of `probes(space, costs)`, nats per token.
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

    @cached_property
    def classes(self) -> np.ndarray:
        """The kind of change behind each of `roots`: [2 groups] integers."""
        kinds = sorted({gene.kind for gene in self.groups})
        own = np.array([kinds.index(gene.kind) for gene in self.groups], dtype=np.int64)
        return np.concatenate([own, own + len(kinds)])

    def roots(self, genome: Genome) -> np.ndarray:
        """Square root of the divergence that each group causes alone: [2 groups].

        Groups whose rule has a compensation have places of their own in the second half, since a compensation restores
        what all tokens miss in common, and so lowers the loss more than the divergence.
        """
        found = np.array([self.root(gene, genome) for gene in self.groups])
        ranked = np.array([gene.kind == "level" and self._ranked(gene, genome) for gene in self.groups], dtype=bool)
        return np.concatenate([np.where(ranked, 0.0, found), np.where(ranked, found, 0.0)])

    def _ranked(self, gene: Gene, genome: Genome) -> bool:
        return RULES[self._space.value(genome, "rule", gene.index, 0)].rank > 0

    def loss(self, genome: Genome) -> float:
        """Divergence of an individual by the additive model, nats per token."""
        return float((self.roots(genome) ** 2).sum())

    def root(self, gene: Gene, genome: Genome) -> float:
        """Square root of the divergence that one group causes alone."""
        value = self._space.value(genome, gene.kind, gene.index, 0)
        if gene.kind == "level" and value >= LEVELS:
            return 0.0
        rule = self._space.value(genome, "rule", gene.index, 0) if gene.kind == "level" else 0
        return self.curves[gene.kind, gene.index, rule].root(_place(self._space, self._costs, gene, value))


def probes(space: Space, costs: Costs) -> list[Probe]:
    """All measurements that the curves need, in the order of the genes."""
    found: list[Probe] = []
    for gene in space.genes:
        rules = range(len(space.rules)) if gene.kind == "level" else (0,)
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
    """The point of a gene's value on its curve; a format is represented by its bytes."""
    return (
        float(costs.part_bytes(gene.index, space.formats[gene.index][value])) if gene.kind == "format" else float(value)
    )


def _nothing(space: Space, costs: Costs, key: Key) -> float:
    """The point at which a gene leaves the model unchanged."""
    kind, index, _ = key
    if kind == "format":
        return float(costs.part_bytes(index, space.formats[index][-1]))
    return float(LEVELS) if kind == "level" else 0.0
