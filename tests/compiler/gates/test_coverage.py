"""Every expert is run, whether a prompt reaches it or not, and what text uses is a figure alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.coverage import ROWS, ExpertCalls, LayerResult, judge_coverage, run_every_expert
from moec.compiler.gates.integrity import Comparisons
from moec.compiler.gates.reference import SAMPLED, Batch, HiddenStates, Oracle, Trace
from moec.compiler.gates.tolerance import EXPERT_LIMITS, Precision
from moec.compiler.gates.usage import Usage
from moec.compiler.ir.interpreter import ActivationRounding, Interpreter, ProgramRunner
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, MoeLayer, Program
from moec.compiler.ir.weights import LazyTensor
from moec.targets.stored_weights import StoredWeight

from .conftest import changed, program_experts, prompts, zero_4kb  # noqa: TID252 - tests are no package with a name

Captured = tuple[Checkpoint, Program]
LAYERS = tuple(MoeLayer(i, f"layers.{i}.experts", "", 4, 2, 8, 8, "", "") for i in range(2))


def _trace(*experts: list[list[int]]) -> Trace:
    slots = {layer: np.array([rows], dtype=np.int32) for layer, rows in enumerate(experts)}
    tokens = len(experts[0])
    return Trace(np.zeros((1, tokens, 3), np.float32), np.zeros((1, tokens), dtype=bool), slots)


def test_usage_counts_neither_dropped_slots_nor_positions_left_out() -> None:
    usage = Usage(LAYERS)
    trace = _trace([[0, 1], [2, 3]], [[0, -1], [1, 2]])
    usage.add(trace, np.array([[True, False]]))
    assert usage.never() == {"layers.0.experts": [2, 3], "layers.1.experts": [1, 2, 3]}
    assert usage.share == 3 / 8
    usage.add(trace, np.array([[True, True]]))
    assert usage.never() == {"layers.1.experts": [3]}
    assert usage.tokens == 3
    assert usage.figures()["layers"][0]["tokens"] == [2, 2, 1, 1]


@pytest.fixture(scope="module")
def hidden(mixtral: Captured) -> dict[int, Tensor]:
    """Hidden states that the experts of the model meet."""
    states = HiddenStates(mixtral[1])
    runner = ProgramRunner(mixtral[1], observer=states)
    runner.prefill(prompts(mixtral[1]).random(1, 5))
    runner.prefill(prompts(mixtral[1]).random(1, 100))
    runner.prefill(prompts(mixtral[1]).random(1, 7))
    return states.rows


def test_hidden_states_are_those_of_the_longest_sequence(mixtral: Captured, hidden: dict[int, Tensor]) -> None:
    program = mixtral[1]
    seen: list[Tensor] = []
    runner = ProgramRunner(
        program, observer=lambda node, args, _: seen.append(args[0]) if node.target is EXPERTS else None
    )
    runner.prefill(prompts(program).random(1, 100))
    for layer, rows in hidden.items():
        assert rows.shape == (SAMPLED, program.layers[layer].hidden_size)
        assert (rows[:, None] == seen[layer][None]).all(-1).any(-1).all()


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_reference_runs_the_experts_beside_the_cases(mixtral: Captured, share: float) -> None:
    program = mixtral[1]
    calls = ExpertCalls(program, share)
    read: list[tuple[str, int]] = []
    given = prompts(program)
    oracle = Oracle(program, 0.0, guests=calls, weight_observer=lambda name, index, _: read.append((name, index)))
    oracle.traces([Batch(given.random(1, 5)), Batch(given.random(1, 100)), Batch(given.random(2, 7))])
    assert len(read) == len(set(read)), "an expert was read twice"

    seen = HiddenStates(program)
    given = prompts(program)
    given.random(1, 5)
    ProgramRunner(program, observer=seen).prefill(given.random(1, 100))
    for layer, rows in calls.hidden.items():
        assert torch.equal(rows, seen.rows[layer])

    artifact = program_experts(zero_4kb(program, 1, 0))
    apart = run_every_expert(program, {"": artifact}, calls.hidden, share)
    assert run_every_expert(program, {"": artifact}, calls.hidden, share, outputs=calls.outputs) == apart
    assert apart[1].wrong(1e-4) == [0]

    before, read[:] = dict(calls.hidden), []
    oracle.traces([Batch(given.random(1, 200))])
    assert all(calls.hidden[layer] is rows for layer, rows in before.items()), "a layer was run again"


def test_outputs_of_the_reference_are_not_computed_again(mixtral: Captured) -> None:
    program = mixtral[1]
    calls = ExpertCalls(program)
    Oracle(program, 0.0, guests=calls).trace(prompts(program).random(1, 100))
    changed_outputs = {layer: [output + 1 for output in outputs] for layer, outputs in calls.outputs.items()}
    experts = {"": program_experts(program)}
    assert not any(
        result.wrong(1e-4) for result in run_every_expert(program, experts, calls.hidden, outputs=calls.outputs)
    )
    for result in run_every_expert(program, experts, calls.hidden, outputs=changed_outputs):
        assert len(result.wrong(1e-4)) == result.layer.num_experts


def _judge(program: Program, artifact: Program, hidden: dict[int, Tensor], share: float = 1.0) -> Verdict:
    results = run_every_expert(program, {"the artifact": program_experts(artifact)}, hidden, share)
    return judge_coverage(results, ["the artifact"], Precision.FP32, share, Usage(program.layers))


def test_a_right_artifact_passes_and_text_decides_nothing(mixtral: Captured, hidden: dict[int, Tensor]) -> None:
    program = mixtral[1]
    verdict = _judge(program, program, hidden)
    assert verdict.status is Status.PASS
    total = sum(row.num_experts for row in program.layers)
    assert f"{total} of {total} experts in {len(program.layers)} layers run one by one" in verdict.summary
    assert "0 tokens of text used 0 of them" in verdict.summary
    assert verdict.figures["max_error"] == 0.0


def test_one_expert_that_no_text_reaches_is_seen(mixtral: Captured, hidden: dict[int, Tensor]) -> None:
    """A router that never chooses it hides a broken expert from every prompt, and not from this."""
    program = mixtral[1]
    for layer, expert in ((0, 5), (1, 0), (1, program.layers[1].num_experts - 1)):
        verdict = _judge(program, zero_4kb(program, layer, expert), hidden)
        assert verdict.status is Status.FAIL
        assert verdict.exit_code == 5
        assert verdict.figures["experts"][layer]["wrong"] == [expert]
        assert verdict.figures["experts"][1 - layer]["wrong"] == []
        assert f"wrong: {program.layers[layer].module} {expert}" in verdict.summary


def test_experts_that_changed_places_and_nan_are_seen(mixtral: Captured, hidden: dict[int, Tensor]) -> None:
    program = mixtral[1]

    def swap(stack: Tensor) -> None:
        stack[[2, 3]] = stack[[3, 2]]

    swapped = changed(program, program.layers[1].down_proj, swap)
    assert _judge(program, swapped, hidden).figures["experts"][1]["wrong"] == [2, 3]
    poisoned = changed(program, program.layers[0].down_proj, lambda stack: stack[1].fill_(torch.nan))
    verdict = _judge(program, poisoned, hidden)
    assert verdict.figures["experts"][0]["wrong"] == [1]
    assert verdict.figures["max_error"] == np.inf


@pytest.mark.parametrize("limit", [0.0, 14.0])
def test_a_limit_of_the_gate_that_no_text_reaches_is_seen(gpt_oss: Captured, limit: float) -> None:
    program, states = gpt_oss[1], HiddenStates(gpt_oss[1])
    ids = prompts(program).random(1, 100)
    expected = ProgramRunner(program, observer=states).prefill(ids)
    graph = program.copy_graph()
    for node in graph.find_nodes(op="call_function", target=EXPERTS):
        node.args = dataclasses.replace(Experts.of(node), limit=limit).args
    other = program.replace(graph=graph)
    np.testing.assert_array_equal(ProgramRunner(other).prefill(ids), expected)
    assert _judge(program, program, states.rows).status is Status.PASS
    verdict = _judge(program, other, states.rows)
    assert [row["wrong"] for row in verdict.figures["experts"]] == [list(range(8))] * len(program.layers)


@pytest.mark.parametrize(("share", "run"), [(0.25, 2), (0.3, 3), (0.0, 0)])
def test_a_share_of_the_experts_is_spread_over_all(
    share: float, run: int, mixtral: Captured, hidden: dict[int, Tensor]
) -> None:
    program = mixtral[1]
    results = run_every_expert(program, {"": program_experts(program)}, hidden, share)
    assert [len(result.errors) for result in results] == [run] * len(program.layers)
    if run > 1:
        assert {0, program.layers[0].num_experts - 1} <= set(results[0].errors)
    verdict = judge_coverage(results, [""], Precision.FP32, share, Usage(program.layers))
    assert verdict.status is Status.PASS
    more = judge_coverage(results, [""], Precision.FP32, 0.9, Usage(program.layers))
    assert more.status is Status.FAIL


def test_both_gates_read_every_expert_once_and_one_token_goes_to_one(
    mixtral: Captured, hidden: dict[int, Tensor]
) -> None:
    program, reads = mixtral[1], dict[tuple[str, int], int]()

    class Counted(LazyTensor):
        def __init__(self, name: str, source: LazyTensor) -> None:
            self._name, self._source, self.shape, self.dtype = name, source, source.shape, source.dtype

        def rows(self, start: int, stop: int) -> Tensor:
            assert stop == start + 1
            reads[self._name, start] = reads.get((self._name, start), 0) + 1
            return self._source.rows(start, stop)

    names = [name for row in program.layers for name in (row.gate_up_proj, row.down_proj)]
    counted: dict[str, LazyTensor] = {name: Counted(name, program.weights[name]) for name in names}
    watched = program.replace(weights=program.weights.with_tensors(counted))
    routes: list[np.ndarray] = []

    def artifact(layer: int, states: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        assert len(states) == len(indices) == len(weights)
        assert (np.sort(indices, axis=1)[:, 1:] != np.sort(indices, axis=1)[:, :-1]).all()
        assert ((weights > 0).sum(axis=1) == 1).all()
        own = indices[weights > 0]
        for expert in np.unique(own):
            assert len(np.unique(states[own == expert], axis=0)) == ROWS, "each sees several hidden states"
        routes.append(indices[weights > 0])
        return program_experts(program)(layer, states, indices, weights)

    def stored(name: str) -> StoredWeight:
        return StoredWeight(None, lambda start, stop: program.weights[name].rows(start, stop).numpy())

    comparisons = Comparisons(watched, {name: stored(name) for name in (*names, "model.embed_tokens.weight")})
    run_every_expert(watched, {"": artifact}, hidden, watch=comparisons.compare)
    assert comparisons.judge().status is Status.PASS
    assert set(reads.values()) == {1}
    assert len(reads) == 2 * sum(row.num_experts for row in program.layers)
    counts = np.bincount(np.concatenate(routes))
    assert set(counts.tolist()) == {ROWS * len(program.layers)}


def test_a_runner_of_another_shape_is_an_error(mixtral: Captured, hidden: dict[int, Tensor]) -> None:
    run: Callable[..., np.ndarray] = lambda layer, states, *_: states[:1]  # noqa: ARG005, E731
    with pytest.raises(ArtifactError, match="the experts of layer 0 return"):
        run_every_expert(mixtral[1], {"model": run}, hidden)


def test_the_limit_belongs_to_the_precision() -> None:
    results = [LayerResult(row, dict.fromkeys(range(4), 2e-2)) for row in LAYERS]
    statuses = {each: judge_coverage(results, [""], each, 1.0, Usage(LAYERS)).status for each in EXPERT_LIMITS}
    assert [each for each, status in statuses.items() if status is Status.PASS] == [
        Precision.INT8,
        Precision.INT4,
        Precision.INT8_DYNAMIC,
    ]


def test_codes_are_judged_more_strictly_where_the_reference_rounds_activations_too() -> None:
    for error, expected in ((2e-2, Status.FAIL), (5e-3, Status.PASS)):
        results = [LayerResult(row, dict.fromkeys(range(4), error)) for row in LAYERS]
        verdict = judge_coverage(results, [""], Precision.INT4, 1.0, Usage(LAYERS), rounding_known=True)
        assert verdict.status is expected


def test_the_reference_rounds_activations_as_the_kernels_do(mixtral: Captured, hidden: dict[int, Tensor]) -> None:
    program = mixtral[1]
    halved: ActivationRounding = lambda _, states: states / 2  # noqa: E731
    kernel = Interpreter(program, rounding=halved)
    nodes = program.nodes(EXPERTS)

    def run(layer: int, *operands: np.ndarray) -> np.ndarray:
        result: np.ndarray = kernel.experts(nodes[layer], *map(torch.from_numpy, operands)).numpy()
        return result

    wrong = run_every_expert(program, {"model": run}, hidden)
    right = run_every_expert(program, {"model": run}, hidden, rounding=halved)
    assert min(error for result in wrong for error in result.errors.values()) > 0.1
    assert max(error for result in right for error in result.errors.values()) == 0.0
