"""Step 3.7: in some layers experts clamp what the activation of their gate yields, and every target computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.common.validation import validate
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS
from moec.passes.quantize import Quantize
from moec.quantize.plan import QuantizationPlan
from moec.targets import get_target

TARGETS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "tflite": {"prefill": (8,), "context": 32},
    "coreml": {"prefill_chunk": 8, "context": 32},
    "tensorrt": {"engine": False, "context": 32},
}


@pytest.fixture(scope="module")
def program(program_of: Any) -> Any:
    return program_of("Step-3.7-Flash")


def without_limits(program: Any) -> Any:
    graph = program.copy_graph()
    for node in graph.find_nodes(op="call_function", target=EXPERTS):
        own = Experts.of(node)
        node.args = tuple(0.0 if value is own.limit else value for value in own.args)
    return program.replace(graph=graph)


@pytest.mark.parametrize("name", TARGETS)
def test_a_limit_after_the_activation(name: str, program: Any, tmp_path: Path) -> None:
    (gate,) = {Experts.of(node).gate for node in program.nodes(EXPERTS)}
    assert gate.limit > 0
    assert gate.limit_activated
    target = get_target(name)
    options = validate(target.Options, TARGETS[name], where=name)
    assert target.refusals(program, options) == ()
    target.lower(program, options, tmp_path, lambda *_: None)
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (1, 12))
    runner = target.open(tmp_path, threads=1)
    got = np.concatenate([runner.prefill(ids[:, :11]), runner.decode(ids[:, 11:])], axis=1)
    want, free = ProgramRunner(program).prefill(ids), ProgramRunner(without_limits(program)).prefill(ids)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert np.abs(free - want).max() > 1e-2 * np.abs(want).max(), "the limit must matter, or nothing is shown"


def test_the_kernel_for_integers_has_no_such_limit_so_experts_are_products(program: Any, tmp_path: Path) -> None:
    target = get_target("onnx")
    plan = QuantizationPlan.from_dict({"formats": dict.fromkeys(("experts_gate_up", "experts_down"), "int4:channel")})
    quantized = Quantize(plan).run(program).program
    assert target.refusals(quantized, target.Options()) == ()
    lowered = target.lower(quantized, target.Options(), tmp_path, lambda *_: None)
    (found,) = lowered.rejections
    assert found.where == "model.language_model.layers.3.mlp.experts"
    assert found.reason.startswith("the kernel clamps the input of silu, but this model clamps its output")
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (1, 12))
    got, want = target.open(tmp_path, threads=1).prefill(ids), ProgramRunner(quantized).prefill(ids)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
