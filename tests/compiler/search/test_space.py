"""Individuals: what they stand for, and how they are varied, crossed and repaired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moec.compiler.search.costs import Costs, Speed
from moec.compiler.search.evaluation import Evaluator
from moec.compiler.search.objectives import EXPERT_FLOPS, SIZE
from moec.compiler.search.operators import Excess, LayerCrossover, Moves
from moec.compiler.search.seeds import seeds
from moec.compiler.search.sensitivity import Probe, Sensitivities, probes
from moec.compiler.search.space import LEVELS, RULES, Rule, Space
from moec.passes.routing.calibrate.traces import RoutingTrace, kept_share
from moec.passes.routing.policies.per_layer import in_layer
from moec.passes.routing.policies.threshold import Threshold


def test_the_pretrained_model_is_an_individual(space: Space) -> None:
    variant = space.variant(space.unchanged)
    assert variant.policies == (None, None)
    assert variant.removed == ((), ())
    assert set(variant.formats) == {"fp16"}
    assert space.kept(space.unchanged).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rule", range(len(RULES)))
@pytest.mark.parametrize("level", [30, 55, 80])
def test_a_rule_keeps_what_its_level_says(space: Space, rule: int, level: int) -> None:
    genome = space.unchanged.copy()
    genome[space.places["rule", 1]], genome[space.places["level", 1]] = rule, level
    genome = space.canonical(genome)
    first, second = space.kept(genome)
    step = 0.13 if RULES[rule].name == "uniform-k" else 0.01
    assert first == 1.0
    assert second == pytest.approx(level / 100, abs=step)
    policy = space.variant(genome).policies[1]
    assert policy is not None
    assert (policy.name, policy.renormalize) == RULES[rule][:2]
    assert policy.compensation == round(64 * RULES[rule].rank)


def test_a_threshold_compares_the_weights_where_they_do_not_sum_to_one(space: Space) -> None:
    rule = RULES.index(Rule("threshold", False))
    wide = space.slots[0]
    tokens = torch.arange(wide.weights.shape[0])
    varied = replace(wide, weights=wide.weights * (0.25 + 0.5 * (tokens % 3))[:, None])
    summed = replace(wide, weights=wide.shares)
    for slots, absolute in ((varied, True), (summed, False)):
        other = replace(space, slots=(slots, slots))
        policy = other.policy(0, rule, 60)
        assert isinstance(policy, Threshold)
        assert policy.absolute is absolute
        assert kept_share(policy, [slots]) == pytest.approx(0.6, abs=0.01)
        # The sum stays, so that the absolute weights decide nothing.
        assert not getattr(other.policy(0, RULES.index(Rule("threshold", True)), 60), "absolute", None)


def test_one_variant_has_one_spelling(space: Space) -> None:
    genome = space.unchanged.copy()
    genome[space.places["rule", 0]] = 3
    genome[space.places["prune", 1]] = 99
    found = space.canonical(genome)
    assert found[space.places["rule", 0]] == 0
    assert found[space.places["prune", 1]] == 3
    assert np.array_equal(space.canonical(found), found)


def test_those_that_matter_least_go_first(space: Space) -> None:
    genome = space.unchanged.copy()
    genome[space.places["prune", 1]] = 2
    assert space.variant(genome).removed == ((), (0, 2))


def test_the_nearest_individual_keeps_as_much(space: Space) -> None:
    policies = [in_layer(Threshold(tau=0.2, importance=(1.0, 0.9)), layer) for layer in range(len(space.slots))]
    found = space.nearest(policies, ["int8:32"] * len(space.formats))
    assert [type(policy) for policy in space.variant(found).policies] == [Threshold, Threshold]
    assert set(space.variant(found).formats) == {"int8:32"}
    for layer, policy in enumerate(space.variant(found).policies):
        assert policy is not None
        assert policy.knob_value == pytest.approx(policies[layer].knob_value / (1, 0.9)[layer], rel=0.05)


def test_costs_follow_the_choices(space: Space, costs: Costs) -> None:
    base, small = space.unchanged, space.unchanged.copy()
    for place, gene in enumerate(space.genes):
        small[place] = {"format": 0, "prune": gene.high, "level": 50, "rule": 0}[gene.kind]
    whole = costs.of(space.variant(base), space.kept(base))
    less = costs.of(space.variant(small), space.kept(small))
    assert whole["expert-flops"] == 1.0
    assert less["expert-flops"] == pytest.approx(0.5, abs=0.02)
    assert all(less[name] < whole[name] for name in whole)
    assert whole["memory"] > whole["size"] > whole["bytes-per-token"] * 0.5


def test_what_stands_in_for_dropped_experts_costs_work_and_bytes(
    space: Space, costs: Costs, evaluator: Evaluator
) -> None:
    plain, rich = space.unchanged.copy(), space.unchanged.copy()
    ranked = RULES.index(Rule("threshold", False, 1 / 8))
    for genome, rule in ((plain, RULES.index(Rule("threshold", False))), (rich, ranked)):
        genome[space.places["rule", 1]], genome[space.places["level", 1]] = rule, 60
    less, more = (costs.of(space.variant(genome), space.kept(genome)) for genome in (plain, rich))
    row = evaluator.program.layers[1]
    hidden, rank, experts, top_k = row.hidden_size, 8, row.num_experts, row.top_k
    slots = 3 * hidden * row.intermediate_size * top_k * len(evaluator.program.layers)
    work = hidden * (top_k + 2 * rank) + rank
    assert more["expert-flops"] - less["expert-flops"] == pytest.approx(work / slots)
    assert more["size"] - less["size"] == 4 * hidden * (experts + 2 * rank)
    assert more["bytes-per-token"] - less["bytes-per-token"] == 4 * hidden * (top_k + 2 * rank)
    assert costs.compensation_share(1, rank) == pytest.approx(len(evaluator.program.layers) * work / slots)


def test_without_outputs_to_fit_them_to_there_are_no_compensations(space: Space) -> None:
    bare = replace(space, widths=())
    assert max(gene.high for gene in bare.genes if gene.kind == "rule") == len(bare.rules) - 1
    assert not any(rule.rank for rule in bare.rules)
    assert any(rule.rank for rule in space.rules)


def test_a_target_that_cannot_skip_saves_no_work(space: Space, evaluator: Evaluator) -> None:
    pruned = evaluator.runner.pruned_weights
    dense = Costs(evaluator.program, evaluator.parts, pruned, itemsize=4, skips=False, speed=Speed(1e9))
    found = dense.of(space.variant(space.unchanged), [0.5, 0.5])
    assert found == dense.of(space.variant(space.unchanged), [1.0, 1.0])


def test_repair_meets_the_limits_where_it_costs_least(space: Space, costs: Costs, sensitivities: Sensitivities) -> None:
    size = 0.6 * costs.of(space.variant(space.unchanged), space.kept(space.unchanged))["size"]
    moves, limits = Moves(space, sensitivities), {EXPERT_FLOPS: 0.8, SIZE: size}
    excess = Excess(space, costs, limits)
    assert excess(space.unchanged) > 0
    found = moves.repaired(space.unchanged, excess)
    assert excess(found) == 0
    first, second = space.kept(found)
    assert first > second
    assert np.array_equal(moves.repaired(found, excess), found)


def test_budget_moves_to_where_it_is_missed_most(space: Space, sensitivities: Sensitivities) -> None:
    genome = space.unchanged.copy()
    levels = [space.places["level", layer] for layer in range(len(space.slots))]
    genome[levels] = 60
    found = Moves(space, sensitivities).move_slots(genome, np.random.default_rng(0))
    assert found[levels[0]] > 60 > found[levels[1]]
    assert found[levels].sum() == 120


def test_layers_swap_rule_and_level_together(space: Space, sensitivities: Sensitivities) -> None:
    genome = space.unchanged.copy()
    pairs = [[space.places["rule", layer], space.places["level", layer]] for layer in range(len(space.slots))]
    genome[pairs[0]], genome[pairs[1]] = [2, 40], [4, 70]
    found = Moves(space, sensitivities).swap(genome, np.random.default_rng(0))
    assert found[pairs[0]].tolist() == [4, 70]
    assert found[pairs[1]].tolist() == [2, 40]


def test_layers_are_crossed_as_a_whole(space: Space) -> None:
    parents = np.stack([np.tile(space.low, (20, 1)), np.tile(space.high, (20, 1))])
    found = LayerCrossover(space)._do(None, parents, random_state=np.random.default_rng(0))
    sides = set()
    for mating in range(20):
        for block in space.blocks:
            low = (found[0, mating, block] == space.low[block]).all()
            assert low or (found[0, mating, block] == space.high[block]).all()
            sides.add(bool(low))
            assert (found[:, mating, block].sum(axis=0) == (space.low + space.high)[block]).all()
    assert sides == {True, False}


def test_changes_stay_within_bounds_and_repeat_themselves(space: Space, sensitivities: Sensitivities) -> None:
    def walk() -> list[list[int]]:
        random, genome, moves = np.random.default_rng(3), space.unchanged, Moves(space, sensitivities)
        found = []
        for _ in range(300):
            genome = moves.change(genome, random)
            found.append(genome.tolist())
        return found

    walked = walk()
    assert walked == walk()
    assert len({tuple(row) for row in walked}) > 150
    assert all((space.low <= row).all() and (row <= space.high).all() for row in np.array(walked))


def test_between_two_measurements_the_root_is_interpolated(space: Space, sensitivities: Sensitivities) -> None:
    genome = space.unchanged.copy()
    genome[space.places["level", 0]] = 90
    genome[space.places["level", 1]] = 70
    places = [(gene.kind, gene.index) for gene in sensitivities.groups]
    roots = dict(zip(places, sensitivities.roots(genome)[: len(places)], strict=True))
    assert roots["level", 0] == pytest.approx(0.1)
    assert roots["level", 1] == pytest.approx(0.3 * 0.1**0.5)
    assert roots["format", 0] == 0


def test_a_compensated_layer_has_a_place_of_its_own_in_what_the_surrogate_sees(
    space: Space, sensitivities: Sensitivities
) -> None:
    groups = len(sensitivities.groups)
    place = next(index for index, gene in enumerate(sensitivities.groups) if (gene.kind, gene.index) == ("level", 1))
    for rule in (Rule("threshold", False), Rule("threshold", False, 1 / 8)):
        genome = space.unchanged.copy()
        genome[space.places["rule", 1]], genome[space.places["level", 1]] = RULES.index(rule), 50
        found = sensitivities.roots(genome)
        assert np.flatnonzero(found).tolist() == [place + (groups if rule.rank else 0)]
    classes = sensitivities.classes
    assert len(classes) == 2 * groups
    assert classes[place] != classes[place + groups]
    assert len(set(classes.tolist())) == 2 * len({gene.kind for gene in sensitivities.groups})


@pytest.mark.parametrize("gain", [0.2, 1.0])
def test_the_first_individuals_are_compensated_where_the_measurements_say_so(
    space: Space, costs: Costs, gain: float
) -> None:
    def loss(probe: Probe) -> float:
        kind, layer, rule = probe.key
        lost = (1 - probe.place / LEVELS) ** 2 if kind == "level" else 1e-4
        return lost * (1.0 if layer == 0 else 0.5) * (gain if kind == "level" and RULES[rule].rank else 1.0)

    measured = Sensitivities(space, costs, [loss(probe) for probe in probes(space, costs)])
    traces = [RoutingTrace(own.weights, own.indices, own.hidden[:, 0]) for own in space.slots]
    found = seeds(space, costs, measured, traces)
    assert np.array_equal(found[0], space.unchanged)
    layers = range(len(space.slots))
    ranked = [any(space.rank(layer, space.value(one, "rule", layer, 0)) for layer in layers) for one in found]
    kept = [costs.of(space.variant(genome), space.kept(genome))["expert-flops"] for genome in found]
    # Without a gain, a compensation is work for nothing.
    assert any(ranked) is (gain < 1)
    shares = [share for each, share in zip(ranked, kept, strict=True) if each is (gain < 1)]
    assert min(shares) < 0.45
    assert len({round(share, 1) for share in shares}) > 4
    # The work of a compensation is part of the budget.
    assert all(share <= 0.91 for each, share in zip(ranked, kept, strict=True) if each)


@pytest.mark.parametrize("formats", [True, False])
def test_the_first_individuals_have_one_rule_for_all_layers(space: Space, costs: Costs, formats: bool) -> None:
    space = space if formats else replace(space, formats=((space.formats[0][-1:]),) * len(space.formats))
    own, common = (RULES.index(Rule(name, False)) for name in ("top-p", "uniform-k")), RULES.index(Rule("ratio", True))
    best = dict(enumerate(own))

    def loss(probe: Probe) -> float:
        kind, layer, rule = probe.key
        if kind != "level":
            return 1e-4
        return (1 - probe.place / LEVELS) ** 2 * (0.4 if rule == best[layer] else 0.5 if rule == common else 1.0)

    measured = Sensitivities(space, costs, [loss(probe) for probe in probes(space, costs)])
    found = seeds(
        space, costs, measured, [RoutingTrace(own.weights, own.indices, own.hidden[:, 0]) for own in space.slots]
    )
    used = [
        {space.value(one, "rule", layer, 0) for layer in (0, 1) if space.value(one, "level", layer, 0) < LEVELS}
        for one in found[1:8]
    ]
    assert max(map(len, used)) == 1
    assert {common} in used
    assert any([space.value(one, "rule", layer, 0) for layer in (0, 1)] == [best[0], best[1]] for one in found[8:])
