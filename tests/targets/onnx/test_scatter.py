"""No scatter adds in any form: threads that add to one row lose updates (microsoft/onnxruntime#18048, #23396)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from moec.compiler.common.verdict import Status
from moec.compiler.gates.repeatability import GATE, RepeatabilityOptions, judge_repeatability
from moec.compiler.gates.tolerance import Precision
from moec.compiler.ir.program import EXPERTS, Program
from moec.targets.onnx import lower
from moec.targets.onnx.files import MODEL
from moec.targets.onnx.lowerings.table import onnx_dialect
from moec.targets.onnx.target import OnnxTarget
from moec.targets.tensorrt.forms import Form
from moec.targets.tensorrt.lowerings.table import tensorrt_dialect

ROOT = Path(__file__).resolve().parents[3]
DIALECTS = {
    "default": onnx_dialect(contrib=True),
    "grouped": onnx_dialect(contrib=True, grouped=True),
    "portable": onnx_dialect(contrib=False),
    "genai": onnx_dialect(contrib=True, shared_buffer=True),
    **{f"tensorrt {form}": tensorrt_dialect(form, 24) for form in Form if form is not Form.AUTO},
}


def adding(model: Any) -> list[str]:
    """Scatters of a model, branches and loops included, that combine what they write with what is there."""
    found = []
    for node in model.graph.all_nodes():
        how = node.attributes.get("reduction")
        if node.op_type.startswith("Scatter") and how is not None and how.value != "none":
            found.append(node.name)
    return found


@pytest.fixture(scope="module")
def programs(program_of: Any) -> dict[torch.dtype, Program]:
    """gpt-oss: biases, a window, sinks and scatters of the router, in both precisions."""
    return {dtype: program_of("gpt_oss", dtype) for dtype in (torch.float32, torch.float16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_form_adds_by_a_scatter(dialect: str, dtype: torch.dtype, programs: dict[torch.dtype, Program]) -> None:
    model, _ = lower.build(programs[dtype], DIALECTS[dialect])
    assert adding(model) == []


def crowded(d: Any) -> tuple[Any, ...]:
    """Slots that were dropped name the expert of another slot, or none at all; the first token has no slot."""
    generator = torch.Generator().manual_seed(d.b)
    count, hidden, inner, tokens = 5, 16, 8, d.b
    indices = torch.stack([torch.randperm(count, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator) + 0.1
    weights[::2, 1] = 0
    indices[::2, 1] = indices[::2, 0]
    weights[::3, 2] = 0
    indices[::3, 2] = -1
    weights[:1] = 0
    fixed = torch.Generator().manual_seed(0)
    up = torch.randn(count, 2 * inner, hidden, generator=fixed) / 4
    down = torch.randn(count, hidden, inner, generator=fixed) / 4
    x = torch.randn(tokens, hidden, generator=generator)
    plain = ("silu", True, False, False, 1.0, 0.0, 0.0)
    return x, indices, weights, d.weight(up), None, d.weight(down), None, *plain


@pytest.mark.parametrize("contrib", [True, False], ids=["kernel", "grouped"])
def test_slots_that_share_an_expert_and_slots_without_one(contrib: bool, check_op: Any) -> None:
    check_op(EXPERTS, crowded, contrib=contrib)


@pytest.mark.parametrize("contrib", [True, False], ids=["kernel", "grouped"])
def test_two_threads_and_no_optimization(contrib: bool, one_op: Any, tmp_path: Path) -> None:
    one = one_op(EXPERTS, crowded)
    model, context = lower.build(one.program, onnx_dialect(contrib=contrib))
    lower.write(model, context, tmp_path / MODEL, lambda *_: None)
    feeds, want = one.feeds(400, 1), one.expected(400, 1).numpy()
    for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.graph_optimization_level = 2, level
        session = ort.InferenceSession(str(tmp_path / MODEL), options, providers=["CPUExecutionProvider"])
        names = {spec.name for spec in session.get_inputs()}
        for _ in range(20):
            (got,) = session.run(["logits"], {name: feeds[name] for name in names})
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """`benchmarks/repeatability.py`, which can write the form that adds."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import repeatability

        yield repeatability
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_gate_passes_what_is_written_and_catches_a_scatter_that_adds(
    benchmark: Any, golden_model: Path, lower_checkpoint: Any, tmp_path: Path
) -> None:
    model = lower_checkpoint(golden_model)
    ids = np.random.default_rng(0).integers(3, model.program.vocab_size, (1, 480))
    runner = OnnxTarget().open(model.directory, threads=2)
    right = judge_repeatability(runner, ids, Precision.FP32, RepeatabilityOptions(runs=8))
    assert (right.gate, right.status) == (GATE, Status.PASS)
    assert right.figures["identical"] == 7
    changed = OnnxTarget().open(benchmark.write_adding_form(model.directory, tmp_path / "adding"), threads=2)
    np.testing.assert_allclose(changed.prefill(ids[:, :9]), runner.prefill(ids[:, :9]), rtol=1e-3, atol=1e-4)
    # Chance decides: of 3 runs of the gate, each of 20 prefills, one at least sees a lost update.
    assert any(judge_repeatability(changed, ids, Precision.FP32).status is Status.FAIL for _ in range(3))
