"""States that are no caches, in the file and in its runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import LoweringError
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.targets.tflite import lower
from moec.targets.tflite.engine import TOKEN_COUNT
from moec.targets.tflite.runner import TfliteRunner
from tests.support.checks import exported

aten = torch.ops.aten


@pytest.fixture
def hybrid(program_of: Callable[[str], Program]) -> Program:
    return program_of("lfm2_moe")


def tokens(program: Program, count: int = 45) -> np.ndarray:
    return np.random.default_rng(count).integers(3, program.vocab_size, (1, count))


def difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def in_pieces(runner: TfliteRunner, ids: np.ndarray, cut: int) -> np.ndarray:
    parts = [runner.prefill(ids[:, :cut]), runner.decode(ids[:, cut : cut + 1]), runner.decode(ids[:, cut + 1 :])]
    return np.concatenate(parts, axis=1)


def test_signatures(hybrid: Program) -> None:
    model, _ = lower.build(hybrid, lengths=(1, 16), capacity=48, branches=True)
    for name, graph in model.signatures.items():
        inputs, outputs = ({key: value.shape for key, value in values} for values in (graph.inputs, graph.outputs))
        assert inputs["conv_state_0"] == outputs["conv_state_0"] == inputs["conv_state_2"] == (1, 64, 3)
        assert inputs["kv_cache_k_1"] == outputs["kv_cache_k_1"] == (1, 2, 48, 16)
        assert inputs.get(TOKEN_COUNT) == (None if name == "decode" else (1,))
    assert lower.signature(hybrid, model)["states"][0] == {"layer": 0, "kind": "conv", "name": "conv_state_0"}


def test_models_of_caches_alone_have_no_such_input(program_of: Callable[[str], Program]) -> None:
    model, _ = lower.build(program_of("mixtral"), lengths=(1, 16), capacity=48, branches=True)
    assert not {TOKEN_COUNT} & {name for graph in model.signatures.values() for name, _ in graph.inputs}


def test_a_prompt_in_two_pieces_is_one_and_padding_reaches_no_state(build: Any, hybrid: Program) -> None:
    runner, ids = build.runner(hybrid), tokens(hybrid)
    want = ProgramRunner(hybrid).prefill(ids)
    # 16: one piece; 5, 21: padded pieces, followed by a single token; 2: a padded piece shorter than a kernel; 44: the
    # same at the end.
    for cut in (16, 5, 21, 1, 2, 44):
        last = in_pieces(runner, ids, cut) if cut < 44 else runner.prefill(ids)
        assert difference(last, want) < 1e-5, cut


def test_the_padding_would_be_noticed(build: Any, hybrid: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that keeps it out is the number of tokens: told that there is none, the file takes it for tokens."""
    runner, ids = build.runner(hybrid), tokens(hybrid)
    want, run, counts = ProgramRunner(hybrid).prefill(ids), runner._engine.run, []

    def deceived(signature: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
        if signature == "prefill_16":
            counts.append(int(feeds[TOKEN_COUNT][0]))
            feeds = {**feeds, TOKEN_COUNT: np.array([16], np.int32)}
        return run(signature, feeds)

    monkeypatch.setattr(runner._engine, "run", deceived)
    assert difference(in_pieces(runner, ids, 5), want) > 1e-2
    assert counts == [5, 16, 16, 7]


def test_reset_forgets_and_a_fork_has_states_of_its_own(build: Any, hybrid: Program) -> None:
    runner, ids = build.runner(hybrid), tokens(hybrid, 12)
    want = runner.prefill(ids)
    twin = runner.fork()
    assert np.array_equal(twin.decode(ids), want)
    assert difference(runner.decode(ids), want) > 1e-2, "what came before must matter, or nothing is shown"
    runner.reset()
    assert np.array_equal(runner.decode(ids), want)


@pytest.mark.parametrize(
    ("operation", "arguments"), [(aten.neg.default, ()), (aten.slice.Tensor, (2, 0, 3, 1))], ids=["negative", "first"]
)
def test_a_state_that_is_made_otherwise_is_refused(
    operation: Any, arguments: tuple[int, ...], build: Any, hybrid: Program
) -> None:
    """Whatever is not the end of past and new inputs cannot be cut before the padding."""
    graph = hybrid.copy_graph()
    output = graph.output_node()
    results: Any = list(output.args[0])  # type: ignore[arg-type]
    last = results[1]
    inputs = last.args[0].args[0]
    with graph.inserting_before(output):
        made = graph.call_function(operation, (inputs if arguments else last, *arguments))
    made.meta = dict(last.meta)
    output.args = ([results[0], made, *results[2:]],)
    with pytest.raises(LoweringError, match="other than the last inputs of a convolution"):
        build.file(hybrid.replace(graph=graph))


def test_an_export_with_all_gates(tiny_checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    verdicts = exported(tiny_checkpoint("lfm2_moe"), "tflite", out, "--prefill", "16,32", "--context", "160")
    assert {verdicts[gate] for gate in ("parity: artifact", "coverage", "integrity", "repeatability")} == {"pass"}


@pytest.mark.parametrize("branches", [True, False])
def test_a_scan_ends_before_the_padding(branches: bool, build: Any, program_of: Callable[[str], Program]) -> None:
    """Gated delta rule in layer 0: a prompt in pieces is one, whatever stands behind the last token."""
    program = program_of("qwen3_next")
    runner, ids = build.runner(program, branches=branches), tokens(program)
    want = ProgramRunner(program).prefill(ids)
    for cut in (16, 5, 21, 1, 44):
        last = in_pieces(runner, ids, cut) if cut < 44 else runner.prefill(ids)
        assert difference(last, want) < 2e-5, cut


@pytest.mark.parametrize("family", ["jamba", "minimax"])
def test_scans_of_other_kinds(family: str, build: Any, program_of: Callable[[str], Program]) -> None:
    program = program_of(family)
    runner, ids = build.runner(program), tokens(program, 30)
    assert difference(in_pieces(runner, ids, 5), ProgramRunner(program).prefill(ids)) < 2e-5


def test_names_of_the_states_of_a_recurrent_layer(program_of: Callable[[str], Program]) -> None:
    model, _ = lower.build(program_of("qwen3_next"), lengths=(1, 16), capacity=48, branches=True)
    for graph in model.signatures.values():
        inputs, outputs = ({key: value.shape for key, value in values} for values in (graph.inputs, graph.outputs))
        assert inputs["recurrent_state_0"] == outputs["recurrent_state_0"] == (1, 4, 16, 16)
        assert inputs["conv_state_0"] == outputs["conv_state_0"] == (1, 128, 4)
    loops = {name: [op.name for op in graph.operators].count("WHILE") for name, graph in model.signatures.items()}
    assert loops == {"decode": 0, "prefill_16": 1}, "one token takes no loop"
