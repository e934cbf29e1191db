"""What stands in for dropped experts: the graph, its numbers, and how it is fitted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from syrupy.assertion import SnapshotAssertion
from torch import Tensor

from moec.compiler.common.errors import UsageError
from moec.compiler.ir.interpreter import Interpreter, ProgramRunner
from moec.compiler.ir.invariants import check_invariants
from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.program import EXPERTS, Program
from moec.passes.routing.calibrate.compensation import Regression, RoutedOutputs, fit_compensations, record_outputs
from moec.passes.routing.compensation import CompensateDropped, Compensation, size, work
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.base import Policy, select
from moec.passes.routing.policies.per_layer import PerLayer
from moec.passes.routing.policies.table import policy
from moec.passes.routing.policies.threshold import Threshold
from moec.passes.routing.policies.top_p import TopP
from tests.support.compensations import random_compensation

TOKENS, TOP_K, HIDDEN, COUNT, INNER = 5, 3, 6, 8, 4
POLICY = TopP(mass=0.6, renormalize=False)


@pytest.fixture
def layer(build: Any) -> Program:
    hidden = build.input("hidden", TOKENS, HIDDEN)
    indices = build.input("indices", TOKENS, TOP_K, dtype=torch.int64)
    weights = build.input("weights", TOKENS, TOP_K)
    generator = torch.Generator().manual_seed(3)
    up = build.weight("up", torch.randn(COUNT, 2 * INNER, HIDDEN, generator=generator))
    down = build.weight("down", torch.randn(COUNT, HIDDEN, INNER, generator=generator))
    gate = ("silu", True, False, False, 1.0, 0.0, 0.0)
    found: Program = build.program(build.call(EXPERTS, hidden, indices, weights, up, None, down, None, *gate))
    return found


def feeds(*rows: list[float]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    indices = torch.stack([torch.randperm(COUNT, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.tensor([*rows, *([0.2, 0.5, 0.3] for _ in range(TOKENS - len(rows)))])
    return {"hidden": torch.randn(TOKENS, HIDDEN, generator=generator), "indices": indices, "weights": weights}


def compensated(program: Program, own: Compensation | None, chosen: Policy = POLICY) -> Program:
    found = CompensateDropped((own,)).run(DynamicRouting(chosen).run(program).program)
    assert found.modified == (own is not None)
    check_invariants(found.program)
    return found.program


def test_the_graph_adds_what_the_formula_says(layer: Program) -> None:
    own, fed = random_compensation(COUNT, HIDDEN, TOP_K), feeds([0.9, 0.05, 0.05], [-1.0, 0.5, 0.2])
    with_it = Interpreter(compensated(layer, own)).run(fed)["logits"]
    without = Interpreter(compensated(layer, None)).run(fed)["logits"]
    selected = select(POLICY, 0, fed["hidden"], fed["indices"], fed["weights"])
    expected = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for slot in range(TOP_K):
            if selected[token, slot] == 0:
                weight = max(float(fed["weights"][token, slot]), 0.0)
                expected[token] += weight * own.table[fed["indices"][token, slot]]
                expected[token] += weight * (fed["hidden"][token] @ own.down @ own.up)
    torch.testing.assert_close(with_it - without, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1


def test_a_token_that_drops_nothing_gets_exactly_nothing(layer: Program) -> None:
    own, all_kept = random_compensation(COUNT, HIDDEN, TOP_K), replace(POLICY, mass=1.0)
    runs = [Interpreter(compensated(layer, each, all_kept)).run(feeds())["logits"] for each in (own, None)]
    assert torch.equal(*runs)


def test_padding_slots_have_no_row_in_the_table() -> None:
    own, hidden = random_compensation(COUNT, HIDDEN, TOP_K), torch.ones(1, HIDDEN)
    padded = own.of(hidden, torch.tensor([[0, COUNT, -1]]), torch.tensor([[0.5, 0.0, 0.0]]))
    assert torch.equal(padded, own.of(hidden, torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.0, 0.0]])))


def test_the_graph(layer: Program, snapshot: SnapshotAssertion) -> None:
    assert format_graph(compensated(layer, random_compensation(COUNT, HIDDEN, TOP_K))) == snapshot


def test_a_layer_that_drops_nothing_is_left_alone(layer: Program) -> None:
    found = CompensateDropped((random_compensation(COUNT, HIDDEN, TOP_K),)).run(layer)
    assert not found.modified
    assert found.program is layer
    assert [item.reason for item in found.rejections] == ["its policy drops no slot"]


def test_pruned_experts_have_no_row(layer: Program) -> None:
    own = random_compensation(COUNT, HIDDEN, TOP_K)
    assert torch.equal(own.without((0, 3)).table, own.table[[1, 2, 4, 5, 6, 7]])
    assert own.without(()).work == own.work == work(TOP_K, HIDDEN, 3) == HIDDEN * (TOP_K + 6) + 3
    assert size(COUNT, HIDDEN, 3) == sum(part.numel() for part in (own.table, own.down, own.up))
    assert layer.layers[0].num_experts == COUNT


def outputs(seed: int, tokens: int, own: Compensation) -> RoutedOutputs:
    """Experts whose outputs are what a compensation says, and noise."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=random)
    indices = torch.stack([torch.randperm(COUNT, generator=random)[:TOP_K] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP_K, generator=random)
    results = own.table[indices] + (hidden @ own.down @ own.up).unsqueeze(1)
    return RoutedOutputs(hidden, indices, weights, results + 0.01 * torch.randn(results.shape, generator=random))


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_fit_finds_what_is_there(renormalize: bool) -> None:
    true, chosen = random_compensation(COUNT, HIDDEN, TOP_K, rank=2), replace(POLICY, renormalize=renormalize)
    problem = Regression(COUNT, HIDDEN, TOP_K)
    for seed in range(6):
        problem.add(chosen, 0, outputs(seed, 500, true))
    found, test = problem.solve(2), outputs(9, 500, true)
    assert found is not None
    selected = select(chosen, 0, test.hidden, test.indices, test.weights)
    missing = ((test.weights - selected).unsqueeze(-1) * test.outputs).sum(1)
    dropped = torch.where(selected == 0, test.weights, 0.0)
    left = (missing - found.of(test.hidden, test.indices, dropped)).square().sum() / missing.square().sum()
    # With renormalization, kept slots are scaled, which no table of dropped experts knows.
    assert float(left) < (0.6 if renormalize else 1e-3)
    if renormalize:
        return
    poorer = problem.solve(1)
    assert poorer is not None
    worse = (missing - poorer.of(test.hidden, test.indices, dropped)).square().sum() / missing.square().sum()
    assert float(left) < 0.9 * float(worse)


def test_nothing_is_fitted_where_nothing_is_dropped() -> None:
    problem = Regression(COUNT, HIDDEN, TOP_K)
    problem.add(TopP(mass=1.0), 0, outputs(0, 50, random_compensation(COUNT, HIDDEN, TOP_K)))
    assert problem.solve(2) is None


def test_a_model_comes_nearer_to_the_pretrained_one(tiny_checkpoint: Any, program_of: Any) -> None:
    program = program_of(tiny_checkpoint("olmoe"))
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (136, 32))
    chosen = Threshold(tau=0.6, renormalize=False, compensation=8)
    fitted = fit_compensations(program, PerLayer(layers=(chosen, None)), ids[:128])
    assert fitted[0] is not None
    assert fitted[1] is None
    missing = [0.0, 0.0]

    def compare(number: int, found: RoutedOutputs) -> None:
        if number == 0:
            selected = select(chosen, 0, found.hidden, found.indices, found.weights)
            dropped = torch.where(selected == 0, found.weights, 0.0)
            wanted = ((found.weights - selected).unsqueeze(-1) * found.outputs).sum(1)
            missing[0] += float(wanted.square().sum())
            missing[1] += float((wanted - fitted[0].of(found.hidden, found.indices, dropped)).square().sum())

    record_outputs(program, ids[128:], compare)
    assert missing[1] < 0.97 * missing[0]
    assert ProgramRunner(program).prefill(ids[:1]).shape[-1] == program.vocab_size


@pytest.mark.parametrize("rank", [-1, 1.5, True, "8", 5000])
def test_a_rank_is_a_whole_number(rank: Any) -> None:
    with pytest.raises(UsageError, match="compensation must be a whole number between 0 and 4096"):
        policy("top-p", mass=0.5, compensation=rank)
