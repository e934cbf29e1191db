"""Ties are found where a decision is close, and nowhere else."""

import numpy as np
import pytest
import torch

from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.compare import excused_positions
from moec.compiler.gates.ties import (
    RouterWatch,
    _comparison_gap,
    _floor_gap,
    _independent,
    _selection_gap,
    _top_k_gap,
    decision_nodes,
)
from moec.compiler.ir.indexer import INDEXER
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.random_drop import RandomDrop

Captured = tuple[Checkpoint, Program]

aten = torch.ops.aten


def test_probabilities_are_judged_by_their_value_and_logits_by_their_spread() -> None:
    probabilities = torch.tensor([[0.9, 0.0201, 0.02, 0.01]])
    assert _top_k_gap(probabilities, 2).item() == pytest.approx(0.0001 / 0.0201, rel=1e-3)
    logits = torch.tensor([[5.0, 0.001, -0.001, -8.0]])
    assert _top_k_gap(logits, 2).item() == pytest.approx(0.002 / 8)


def test_masked_scores_and_full_top_k_are_no_ties() -> None:
    masked = torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf]])
    assert _top_k_gap(masked, 2).item() == torch.inf
    assert _top_k_gap(masked, 3).item() == torch.inf
    assert _top_k_gap(torch.tensor([[1.0, 1.0]]), 2).item() == torch.inf
    assert _top_k_gap(torch.tensor([[1.0, 1.0, 1.0]]), 2).item() == 0


def test_a_comparison_is_a_tie_when_close_but_not_when_identical() -> None:
    gap = _comparison_gap(torch.tensor([0.5, 0.500001, 0.7]), 0.5)
    assert gap[0] == torch.inf  # one value by construction
    assert gap[1] == pytest.approx(1e-6, rel=0.1)
    assert gap[2] == pytest.approx(0.2)
    large = _comparison_gap(torch.tensor([50.0, -100.0]), torch.tensor([50.5, 100.0]))
    assert large.tolist() == pytest.approx([0.5 / 50.5, 2.0])


def test_rounding_down_is_a_tie_next_to_an_integer(mixtral: Captured) -> None:
    assert _floor_gap(torch.tensor([2.9999, 3.0001, 3.5, -0.0001])).tolist() == pytest.approx(
        [1e-4 / 3, 1e-4 / 3, 0.5 / 3.5, 1e-4], rel=0.05
    )
    # A policy that drops slots by a hash of the hidden state takes the fraction of a number.
    routed = DynamicRouting(RandomDrop(probability=0.5)).run(mixtral[1]).program
    found = [node.target for node in decision_nodes(routed.graph)]
    assert found.count(aten.floor.default) == len(routed.layers)
    watch = RouterWatch(routed, margin=1e-4)
    watch.begin(2, 5)
    ProgramRunner(routed, observer=watch).prefill(np.arange(10).reshape(2, 5))


def test_equal_sides_are_one_value_only_if_one_is_made_from_the_other() -> None:
    graph = torch.fx.Graph()
    scores = graph.placeholder("scores")
    best = graph.call_function(aten.amax.default, (scores, [-1], True))
    before = graph.call_function(aten.cumsum.default, (scores, -1))
    share = graph.call_function(aten.mul.Tensor, (best, 0.5))
    assert not _independent(graph.call_function(aten.ge.Tensor, (scores, best)))
    assert not _independent(graph.call_function(aten.le.Tensor, (best, scores)))
    assert not _independent(graph.call_function(aten.gt.Scalar, (scores, 0.0)))
    assert _independent(graph.call_function(aten.lt.Tensor, (before, share)))


def test_the_decisions_of_a_router_are_found(mixtral: Captured) -> None:
    program = mixtral[1]
    found = decision_nodes(program.graph)
    assert [node.target for node in found] == [aten.topk.default] * len(program.layers)


def test_the_watch_sees_each_token(mixtral: Captured) -> None:
    program = mixtral[1]
    watch = RouterWatch(program, margin=1e-4)
    runner = ProgramRunner(program, observer=watch)
    ids = np.arange(10).reshape(2, 5)
    watch.begin(2, 5)
    runner.prefill(ids)
    assert not watch.tied.any()
    assert {layer: slots.shape for layer, slots in watch.slots.items()} == {0: (2, 5, 2), 1: (2, 5, 2)}
    assert all((slots >= 0).all() for slots in watch.slots.values())
    wide = RouterWatch(program, margin=1e9)
    wide.begin(2, 5)
    ProgramRunner(program, observer=wide).prefill(ids)
    assert wide.tied.all()


def test_a_slot_of_weight_0_reaches_no_expert(mixtral: Captured) -> None:
    program = mixtral[1]
    watch = RouterWatch(program, margin=1e-4)
    watch.begin(1, 2)
    node = program.nodes(EXPERTS)[1]
    indices, weights = torch.tensor([[0, 7], [3, 8]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    watch(node, (torch.zeros(2, 64), indices, weights), None)
    assert watch.slots[1].tolist() == [[[0, -1], [3, -1]]]  # there is no expert 8: a padding slot


def test_the_slots_next_to_a_policy_s_cut_may_tie(mixtral: Captured) -> None:
    program = mixtral[1]
    (decision, *_) = (node for node in program.graph.nodes if node in decision_nodes(program.graph))
    experts = program.nodes(EXPERTS)[0]
    scores = torch.tensor([[0.4, 0.39999, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1], [0.4, 0.39999, 0.1, 0.1]])
    kept = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])  # a policy dropped the second slot of two tokens
    watch = RouterWatch(program, margin=1e-3)
    watch.begin(1, 3)
    watch(decision, (scores, 2, -1), None)
    assert not watch.tied.any()
    watch(experts, (torch.zeros(3, 64), torch.zeros(3, 2, dtype=torch.int64), kept), None)
    assert watch.tied.tolist() == [[True, False, False]]


def test_a_tie_excuses_itself_and_what_attends_to_it() -> None:
    errors = np.array([[1e-6, 0.1, 0.1, 1e-6, 0.1], [0.1, 1e-6, 1e-6, 1e-6, 1e-6]])
    tied = np.array([[False, True, False, False, False], [False, True, False, False, False]])
    excused = excused_positions(errors, tied, 1e-4)
    assert excused.tolist() == [[False, True, True, False, True], [False] * 5]


def test_a_tie_that_did_not_flip_excuses_nothing() -> None:
    errors = np.array([[1e-6, 0.1]])
    assert not excused_positions(errors, np.array([[True, False]]), 1e-4).any()


def test_nan_is_never_excused() -> None:
    assert not excused_positions(np.array([[np.inf]]), np.array([[True]]), 1e-4).any()


def test_an_indexer_ties_where_a_token_that_it_leaves_scores_like_one_that_it_selects() -> None:
    """Keys of one element whose value is their score; equal ones are selected together, so they are no tie."""

    def gap(*scores: float, top_k: int) -> float:
        past = torch.tensor(scores)[None, None, :-1, None]
        new = torch.tensor(scores)[None, None, -1:, None]
        one = torch.ones(1, 1, 1)
        operands = (one[..., None], new, one, past, torch.tensor([len(scores) - 1]), None, 1.0, "causal", 0, top_k)
        return float(_selection_gap(operands, *INDEXER(*operands)))

    assert gap(4.0, 1.0, 2.0, 2.001, top_k=2) == pytest.approx(0.001 / 4, rel=1e-3)
    assert gap(4.0, 1.0, 2.0, 2.0, top_k=2) == pytest.approx(1.0 / 4)
    assert gap(4.0, 1.0, 2.0, top_k=3) == torch.inf
    assert gap(2.0, 2.0, 2.0, top_k=1) == torch.inf
