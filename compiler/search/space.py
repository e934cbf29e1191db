"""The search space: an individual is a vector of integers that encodes a variant of the model.

Each MoE layer has a routing policy, the share of its slots that the policy keeps on calibration text, and a number of
experts to prune. Each quantizable part has a format. The parameter of a policy is fitted to its share on the routing of
the pretrained model, as `moec calibrate` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moec.compiler.search.variant import Variant
from moec.passes.routing.calibrate.fit import nearest_knob
from moec.passes.routing.calibrate.sensitivities import Calibration
from moec.passes.routing.calibrate.traces import kept_share
from moec.passes.routing.policies.base import Policy, Slots
from moec.passes.routing.policies.table import policy_type
from moec.passes.routing.policies.threshold import Threshold

Genome = np.ndarray[tuple[int], np.dtype[np.int64]]
LEVELS = 100
"""A level is the share of a layer's slots that is kept, in percent; this level keeps all of them."""


class Rule(NamedTuple):
    """How a layer drops slots.

    Attributes:
        name: Name of the policy.
        renormalize: Whether it renormalizes the remaining weights.
        rank: Rank of the compensation, relative to the inner width of an expert; 0: none.
    """

    name: str
    renormalize: bool
    rank: float = 0.0


RULES = (
    Rule("top-p", True),
    Rule("top-p", False),
    Rule("threshold", True),
    Rule("threshold", False),
    Rule("ratio", True),
    Rule("uniform-k", True),
    Rule("uniform-k", False),
    Rule("threshold", False, 1 / 16),
    Rule("threshold", False, 1 / 8),
    Rule("threshold", False, 1 / 4),
    Rule("top-p", False, 1 / 8),
)
"""The rules of a layer; those with a compensation come last."""
VARYING = 1e-3
"""`threshold` compares the weights themselves if the relative standard deviation of their sums is above this."""
BISECTIONS = 24
DIGITS = 5
"""Significant digits of a fitted parameter, which keeps recipes readable."""


@dataclass(frozen=True)
class Gene:
    """One integer of an individual.

    Attributes:
        kind: "rule", "level", "prune" or "format".
        index: Index of the MoE layer, or of the part for "format".
        low: Smallest allowed value.
        high: Largest allowed value.
    """

    kind: str
    index: int
    low: int
    high: int


@dataclass(frozen=True)
class Space:
    """All genes of a model and the variants that they encode.

    Attributes:
        slots: The routing of the pretrained model on calibration text, one entry per MoE layer.
        removable: Experts of each MoE layer that may be pruned, the least important first.
        formats: Text forms of the allowed formats of each part, the smallest first; a single entry is not varied.
        owners: The MoE layer in the same decoder layer as each part; -1: none.
        routing: Whether policies and levels are varied.
        widths: Inner width of the experts of each MoE layer, for the ranks of compensations; empty: there are none.
    """

    slots: tuple[Slots, ...]
    removable: tuple[tuple[int, ...], ...]
    formats: tuple[tuple[str, ...], ...]
    owners: tuple[int, ...]
    routing: bool = True
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_fitted", {})

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that a layer may have."""
        return RULES if self.widths else tuple(rule for rule in RULES if not rule.rank)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """All genes; those of one layer are adjacent."""
        found: list[Gene] = []
        for index, slots in enumerate(self.slots):
            if self.routing and slots.top_k > 1:
                found.append(Gene("rule", index, 0, len(self.rules) - 1))
                found.append(Gene("level", index, math.ceil(LEVELS / slots.top_k), LEVELS))
            if self.removable[index]:
                found.append(Gene("prune", index, 0, len(self.removable[index])))
        found += [Gene("format", index, 0, len(each) - 1) for index, each in enumerate(self.formats) if len(each) > 1]
        return tuple(found)

    @cached_property
    def low(self) -> Genome:
        """Smallest value of each gene."""
        return np.array([gene.low for gene in self.genes], dtype=np.int64)

    @cached_property
    def high(self) -> Genome:
        """Largest value of each gene."""
        return np.array([gene.high for gene in self.genes], dtype=np.int64)

    @cached_property
    def places(self) -> Mapping[tuple[str, int], int]:
        """Kind and index of a gene -> its position in the vector."""
        return {(gene.kind, gene.index): place for place, gene in enumerate(self.genes)}

    @cached_property
    def blocks(self) -> tuple[np.ndarray, ...]:
        """Positions of the genes that crossover exchanges together: those of a layer, or of a part outside layers."""
        found: dict[tuple[str, int], list[int]] = {}
        for place, gene in enumerate(self.genes):
            layer = self.owners[gene.index] if gene.kind == "format" else gene.index
            found.setdefault(("layer", layer) if layer >= 0 else ("part", gene.index), []).append(place)
        return tuple(np.array(places) for places in found.values())

    @cached_property
    def unchanged(self) -> Genome:
        """The individual that encodes the pretrained model in its largest allowed formats."""
        values = {"rule": 0, "level": LEVELS, "prune": 0}
        return np.array([values.get(gene.kind, gene.high) for gene in self.genes], dtype=np.int64)

    def canonical(self, genome: Genome) -> Genome:
        """The unique encoding of a variant: within bounds, and policy 0 for a layer that keeps all slots."""
        found = np.clip(genome, self.low, self.high)
        for index, slots in enumerate(self.slots):
            place = self.places.get(("level", index))
            if place is None:
                continue
            rule = self.places["rule", index]
            if RULES[found[rule]].name == "uniform-k":
                found[place] = round(LEVELS * self._whole(slots, int(found[place])) / slots.top_k)
            if found[place] >= LEVELS:
                found[rule] = 0
        return found

    def variant(self, genome: Genome) -> Variant:
        """The variant that an individual encodes."""
        value = self.value
        policies = [
            self.policy(index, value(genome, "rule", index, 0), value(genome, "level", index, LEVELS))
            for index in range(len(self.slots))
        ]
        removed = [
            tuple(sorted(order[: value(genome, "prune", index, 0)])) for index, order in enumerate(self.removable)
        ]
        formats = [each[value(genome, "format", index, 0)] for index, each in enumerate(self.formats)]
        return Variant(tuple(policies), tuple(removed), tuple(formats))

    def value(self, genome: Genome, kind: str, index: int, default: int) -> int:
        """Value of a gene, or the default if it is not varied."""
        place = self.places.get((kind, index))
        return default if place is None else int(genome[place])

    def policy(self, layer: int, rule: int, level: int) -> Policy | None:
        """The fitted policy of a layer for a rule and a level; None if it keeps all slots."""
        return self._fit(layer, rule, level)[0]

    def kept(self, genome: Genome) -> np.ndarray:
        """Share of the slots that each MoE layer keeps, on the routing of the pretrained model: [layers]."""
        value = self.value
        return np.array(
            [
                self._fit(index, value(genome, "rule", index, 0), value(genome, "level", index, LEVELS))[1]
                for index in range(len(self.slots))
            ]
        )

    def rank(self, layer: int, rule: int) -> int:
        """Rank of the compensation that a rule has in a layer; 0: none."""
        share = RULES[rule].rank
        return max(1, round(share * self.widths[layer])) if share else 0

    def _fit(self, layer: int, rule: int, level: int) -> tuple[Policy | None, float]:
        if level >= LEVELS:
            return None, 1.0
        fitted: dict[tuple[int, int, int], tuple[Policy | None, float]] = self.__dict__["_fitted"]
        if (layer, rule, level) not in fitted:
            fitted[layer, rule, level] = self._fit_anew(layer, rule, level)
        return fitted[layer, rule, level]

    def _fit_anew(self, layer: int, rule: int, level: int) -> tuple[Policy, float]:
        chosen, slots = RULES[rule], self.slots[layer]
        kind = policy_type(chosen.name)
        start = kind.prepare(Calibration([slots], level / LEVELS))
        if isinstance(start, Threshold) and not chosen.renormalize and self._varies(slots):
            # In units of the mean sum, so that the range of tau is the same for all routers.
            start = replace(start, absolute=True, importance=(_digits(1.0 / float(slots.total.mean())),))
        start = replace(start, renormalize=chosen.renormalize, compensation=self.rank(layer, rule))
        if not kind.bisected:
            start = start.with_knob(self._whole(slots, level))
        else:
            start, _ = nearest_knob(start, [slots], level / LEVELS, steps=BISECTIONS)
            start = start.with_knob(_digits(start.knob_value))
        return start, kept_share(start, [slots])

    @staticmethod
    def _varies(slots: Slots) -> bool:
        """Whether the weights of the tokens have different sums."""
        return float(slots.total.std()) > VARYING * float(slots.total.mean())

    @staticmethod
    def _whole(slots: Slots, level: int) -> int:
        return max(1, round(slots.top_k * level / LEVELS))

    def nearest(self, policies: Sequence[Policy | None], formats: Sequence[str] | None = None) -> Genome:
        """The individual nearest to given policies and formats.

        A policy of another kind than the rules becomes the first rule that keeps as many slots.
        """
        found = self.unchanged.copy()
        for index, own in enumerate(policies):
            if own is None or ("rule", index) not in self.places:
                continue
            names = [rule.name for rule in RULES if rule.renormalize == own.renormalize and not rule.rank]
            rule = RULES.index(Rule(own.name if own.name in names else names[0], own.renormalize))
            found[self.places["rule", index]] = rule
            found[self.places["level", index]] = round(LEVELS * kept_share(own, [self.slots[index]]))
        for index, text in enumerate(formats or ()):
            if ("format", index) in self.places and text in self.formats[index]:
                found[self.places["format", index]] = self.formats[index].index(text)
        return self.canonical(found)


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
