"""Artifacts that return the experts of each token, and the counts of their runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.top_p import TopP
from moec.targets.onnx.runner import OnnxRunner
from moec.targets.onnx.target import OnnxOptions, OnnxTarget
from moec.targets.runners import Row


class Counting(ProgramRunner):
    """The reference: it counts the slots that its experts get and that are not dropped."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.found = {row.node: np.zeros(row.num_experts, np.int64) for row in program.layers}

    def _experts(self, node: Any, values: Any, hidden: Any, indices: Any, weights: Any) -> Any:
        used = indices[weights != 0].numpy()
        self.found[node.name] += np.bincount(used, minlength=self.found[node.name].size)
        return super()._experts(node, values, hidden, indices, weights)


def lowered(program: Program, directory: Path, **options: Any) -> OnnxRunner:
    directory.mkdir()
    found = OnnxTarget().lower(program, OnnxOptions.model_validate(options), directory, lambda *_: None)
    graph = ir.load(directory / "model.onnx").graph
    rows = [(row["name"], [str(size) for size in row["shape"]]) for row in found.signature["outputs"]]
    shapes = {value.name: [str(size) for size in value.shape] for value in graph.outputs}
    assert {name for name, _ in rows} <= shapes.keys()
    assert [shapes[name] for name, _ in rows[1:]] == [shape for _, shape in rows[1:]]
    return OnnxRunner(directory, threads=1)


@pytest.mark.parametrize("options", [{}, {"flavor": "portable"}, {"flavor": "genai"}, {"experts": "kernel"}])
@pytest.mark.parametrize("routed", [False, True])
def test_counts_are_those_of_the_program(
    routed: bool, options: dict[str, str], tiny_checkpoint: Any, program_of: Any, tmp_path: Path
) -> None:
    program = program_of(tiny_checkpoint("olmoe"))
    if routed:
        program = DynamicRouting(TopP(mass=0.6)).run(program).program
    runner = lowered(program, tmp_path / "told", routing_outputs=True, **options)
    reference = Counting(program)
    ids = np.random.default_rng(2).integers(3, program.vocab_size, (2, 9))
    for step in (ids[:, :6], ids[:, 6:7], ids[:, 7:8]):
        np.testing.assert_allclose(runner.decode(step), reference.decode(step), atol=1e-4)
    assert [counts.tolist() for counts in runner.expert_tokens.values()] == [
        counts.tolist() for counts in reference.found.values()
    ]
    assert list(runner.expert_tokens) == [row.index for row in program.layers]
    slots = 16 * program.layers[0].top_k
    assert (runner.expert_tokens[0].sum() < slots) if routed else (runner.expert_tokens[0].sum() == slots)


def test_forks_and_batches_count_for_all_and_padding_for_none(
    tiny_checkpoint: Any, program_of: Any, tmp_path: Path
) -> None:
    program = program_of(tiny_checkpoint("olmoe"))
    runner, reference = lowered(program, tmp_path / "told", routing_outputs=True), Counting(program)
    ids = np.random.default_rng(3).integers(3, program.vocab_size, (2, 9))
    long, short = runner.fork(), runner.fork()
    long.prefill(ids[:1, :8])
    short.prefill(ids[1:, :4])
    rows = runner.gather([Row(long), Row(short)])
    mask = np.ones((2, 9), np.int64)
    mask[1, : rows[1].padding] = 0
    runner.decode(np.array([[ids[0, 8]], [ids[1, 4]]]), mask)
    reference.prefill(ids[:1])
    reference.prefill(ids[1:, :5])
    wanted = [counts.tolist() for counts in reference.found.values()]
    assert [counts.tolist() for counts in runner.expert_tokens.values()] == wanted
    padded = np.ones((1, 9), np.int64)
    padded[0, :4] = 0
    runner.prefill(np.roll(ids[1:], 4, axis=1), padded)
    reference.prefill(ids[1:, :5])
    wanted = [counts.tolist() for counts in reference.found.values()]
    assert [counts.tolist() for counts in runner.expert_tokens.values()] == wanted


def test_other_artifacts_return_nothing_more(tiny_checkpoint: Any, program_of: Any, tmp_path: Path) -> None:
    runner = lowered(program_of(tiny_checkpoint("olmoe")), tmp_path / "plain")
    assert runner.expert_tokens == {}
