"""The initial individuals of a search, computed by the exact allocators from the measured sensitivities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np

from moec.compiler.common.errors import UsageError
from moec.compiler.search.costs import Costs
from moec.compiler.search.sensitivity import Sensitivities
from moec.compiler.search.space import LEVELS, RULES, Genome, Rule, Space
from moec.passes.routing.calibrate.collect import MASSES
from moec.passes.routing.calibrate.fit import fit
from moec.passes.routing.calibrate.sensitivities import Sensitivities as LayerLosses
from moec.passes.routing.calibrate.slot_allocation import allocate
from moec.passes.routing.calibrate.traces import RoutingTrace, kept_share
from moec.passes.routing.policies.per_layer import in_layer
from moec.passes.routing.policies.top_p import TopP
from moec.quantize.formats import parse_format
from moec.quantize.planning.allocation import Candidate, trade_off

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the slots to which policies are fitted, and of the work for exact allocations."""
FINE = tuple(share / 100 for share in range(95, 25, -5))
"""Shares of the work for allocations with one rule for all layers, if there are no formats to combine them with."""
POLICIES = ("threshold", "top-p", "layer-k")
POINTS = 7
"""Number of format allocations between the smallest and the most accurate."""
UNITS = 100
"""Resolution of a layer's share in the joint allocation of rules and levels."""


def seeds(space: Space, costs: Costs, sensitivities: Sensitivities, traces: Sequence[RoutingTrace]) -> list[Genome]:
    """Distinct initial individuals, the most useful first.

    They are the pretrained model, exact allocations of levels with one rule for all layers, allocations of formats as
    by `--quantize auto`, combinations of both, exact allocations of rules and levels, also without compensations, and
    policies fitted as by `moec export`. One rule comes before rules by layer: which rule is best in a layer is
    measured on a few windows, so a choice for each layer fits these windows more than other text.
    """
    stored = list(allocated_formats(space, costs, sensitivities))
    every: list[Genome] = [space.unchanged]
    fitted: list[Genome] = []
    if space.routing:
        alike = list(_alike(space, costs, sensitivities, BUDGETS if stored else FINE))
        every += [*alike, *(_joined(space, routed, held) for held in stored[::3] for routed in alike)]
        plain = [index for index, rule in enumerate(space.rules) if not rule.rank]
        for rules in (range(len(space.rules)), plain):
            every += _mixed(space, costs, sensitivities, rules, BUDGETS)
        fitted += _fitted(space, sensitivities, traces)
    every += [*stored, *fitted]
    return [np.array(key) for key in dict.fromkeys(tuple(space.canonical(genome).tolist()) for genome in every)]


def _alike(space: Space, costs: Costs, sensitivities: Sensitivities, budgets: Sequence[float]) -> Iterator[Genome]:
    """For each budget, of the allocations with one rule for all layers, the one with the least total loss."""
    every = [list(_mixed(space, costs, sensitivities, [rule], budgets)) for rule in range(len(space.rules))]
    for listed in zip_longest(*every):
        yield min((genome for genome in listed if genome is not None), key=sensitivities.loss)


def _mixed(
    space: Space, costs: Costs, sensitivities: Sensitivities, rules: Sequence[int], budgets: Sequence[float]
) -> Iterator[Genome]:
    """Allocations with the least total loss for each budget, over these rules (Alloc-MoE, arXiv:2604.08133)."""
    layers = [index for index in range(len(space.slots)) if ("level", index) in space.places]
    if not layers:
        return
    options = [_options(space, costs, sensitivities, layer, rules) for layer in layers]
    losses = [[loss for *_, loss in each] for each in options]
    units = [[unit for _, _, unit, _ in each] for each in options]
    for budget in budgets:
        try:
            chosen = allocate(losses, units, int(budget * UNITS * len(layers)))
        except UsageError:
            continue  # the budget allows less than one slot per token
        found = space.unchanged.copy()
        for layer, each, option in zip(layers, options, chosen, strict=True):
            rule, level, *_ = each[option]
            found[space.places["rule", layer]], found[space.places["level", layer]] = rule, level
        yield found


def _options(
    space: Space, costs: Costs, sensitivities: Sensitivities, layer: int, rules: Sequence[int]
) -> list[tuple[int, int, int, float]]:
    """Rule, level, work and loss of the choices with the least loss for each amount of work, in units of a layer's."""
    place = space.places["level", layer]
    gene = space.genes[place]
    best: dict[int, tuple[float, int, int]] = {}
    for level in range(gene.low, LEVELS + 1):
        for rule in rules if level < LEVELS else rules[:1]:
            genome = space.unchanged.copy()
            genome[place], genome[space.places["rule", layer]] = level, rule
            if space.canonical(genome)[place] == level:
                work = level / LEVELS + costs.compensation_share(layer, space.rank(layer, rule))
                unit = math.ceil(UNITS * work - 1e-9)
                best[unit] = min(best.get(unit, (math.inf, 0, 0)), (sensitivities.root(gene, genome) ** 2, rule, level))
    return [(rule, level, unit, loss) for unit, (loss, rule, level) in sorted(best.items())]


def _fitted(space: Space, sensitivities: Sensitivities, traces: Sequence[RoutingTrace]) -> Iterator[Genome]:
    measured = layer_losses(space, sensitivities)
    for name in POLICIES:
        for budget in BUDGETS:
            try:
                chosen = fit(name, traces, budget, measured)
            except UsageError:
                continue  # this policy cannot reach the budget
            yield space.nearest([in_layer(chosen, layer) for layer in range(len(space.slots))])


def layer_losses(space: Space, sensitivities: Sensitivities) -> LayerLosses:
    """The loss tables that policy fitting needs, interpolated from the measured curves."""
    by_k, by_mass = [], []
    for layer, slots in enumerate(space.slots):

        def loss(level: float, rule: Rule, layer: int = layer) -> float:
            curve = sensitivities.curves.get(("level", layer, RULES.index(rule)))
            return curve.root(level) ** 2 if curve is not None and level < LEVELS else 0.0

        ks = range(1, slots.top_k + 1)
        by_k.append(tuple(loss(LEVELS * k / slots.top_k, Rule("uniform-k", True)) for k in ks))
        shares = [kept_share(TopP(mass=mass), [slots]) for mass in MASSES]
        by_mass.append(tuple(loss(LEVELS * share, Rule("top-p", True)) if share < 1 else 0.0 for share in shares))
    return LayerLosses(tuple(by_k), MASSES, tuple(by_mass))


def allocated_formats(space: Space, costs: Costs, sensitivities: Sensitivities) -> Iterator[Genome]:
    """Allocations of formats with the least loss at several sizes, as by `--quantize auto`, the smallest first."""
    offered = {}
    for gene in space.genes:
        if gene.kind == "format":
            offered[str(gene.index)] = [
                Candidate(
                    parse_format(text),
                    costs.part_bytes(gene.index, text),
                    _loss(space, sensitivities, gene.index, value),
                )
                for value, text in enumerate(space.formats[gene.index])
            ]
    if not offered:
        return
    for allocation in trade_off(offered, points=POINTS):
        found = space.unchanged.copy()
        for name, candidate in allocation.choices:
            index = int(name)
            found[space.places["format", index]] = space.formats[index].index(str(candidate.format))
        yield found


def _loss(space: Space, sensitivities: Sensitivities, index: int, value: int) -> float:
    genome = space.unchanged.copy()
    place = space.places["format", index]
    genome[place] = value
    return sensitivities.root(space.genes[place], genome) ** 2


def _joined(space: Space, routed: Genome, stored: Genome) -> Genome:
    """Combine the routing of the first with the formats of the second."""
    found = routed.copy()
    for place, gene in enumerate(space.genes):
        if gene.kind == "format":
            found[place] = stored[place]
    return found
