"""Quantized models: that the kernels meant for them are those that run, what is stored, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from moec import passes
from moec.compiler.common.verdict import Status
from moec.compiler.families.tiny_models import tiny_model, write_tiny_checkpoint
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.integrity import Comparisons
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.passes.quantize import Quantize
from moec.quantize.formats import Activations
from moec.quantize.plan import QuantizationPlan, requested, with_activations
from moec.targets.onnx.experts import OnnxExperts
from moec.targets.onnx.runner import OnnxRunner
from moec.targets.onnx.target import Flavor, OnnxOptions, OnnxTarget

QUANTIZED = frozenset({"QMoE", "MatMulNBits", "GatherBlockQuantized"})
IDS = np.random.default_rng(0).integers(3, 128, (2, 40))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that blocks of 32 divide, and a head that is tied to the embedding."""
    directory = tmp_path_factory.mktemp("tied")
    tiny_model("olmoe", intermediate_size=96, tie_word_embeddings=True).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def quantized(checkpoint: Path) -> Callable[[QuantizationPlan], Program]:
    program, _ = passes.run_passes(capture(Checkpoint.open(checkpoint)), passes.default_passes())
    return lambda plan: Quantize(plan).run(program).program


@pytest.fixture(scope="module")
def gated_gelu(tmp_path_factory: pytest.TempPathFactory) -> Program:
    directory = tmp_path_factory.mktemp("gelu")
    tiny_model("gemma4_text", moe_intermediate_size=64).save_pretrained(directory)
    program, _ = passes.run_passes(capture(Checkpoint.open(directory)), passes.default_passes())
    return program


def lowered(program: Program, directory: Path, flavor: str = "default", *, profile: bool = False) -> OnnxRunner:
    OnnxTarget().lower(program, OnnxOptions(flavor=Flavor(flavor)), directory, lambda *_: None)
    return OnnxRunner(directory, threads=1, profile=profile)


def difference(runner: OnnxRunner, program: Program) -> float:
    """Difference of prefill and decode from the interpreter, relative to the largest logit, of most positions.

    Activations that are rounded may send a token to another expert where two are all but equal.
    """
    reference = ProgramRunner(program)
    want, found = (
        np.concatenate([one.prefill(IDS[:, :-1]), one.decode(IDS[:, -1:])], 1) for one in (reference, runner)
    )
    worst = np.abs(found - want).max(-1) / np.abs(want).max()
    return float(np.quantile(worst, 0.9))


@pytest.mark.parametrize("flavor", ["default", "genai"])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_the_kernels_for_quantized_weights_are_those_that_run(
    name: str, flavor: str, quantized: Any, tmp_path: Path
) -> None:
    """By ONNX Runtime's own profile, after its optimisers: nothing is dequantized, and only routers stay float."""
    runner = lowered(quantized(requested(name)), tmp_path, flavor, profile=True)
    runner.prefill(IDS)
    runner.decode(IDS[:, -1:])
    spent = runner.kernel_times()
    assert {"QMoE", "MatMulNBits", "GatherBlockQuantized"} <= spent.keys()
    assert not {"MoE", "DequantizeLinear", "QuantizeLinear", "Gemm", "FusedMatMul"} & spent.keys()
    model = ir.load(tmp_path / "model.onnx")
    # ONNX Runtime's optimiser may gather the sizes of a shape, but the artifact gathers no row of a float embedding.
    assert not [node for node in model.graph if node.op_type == "Gather"]
    assert [node.inputs[1].name for node in model.graph if node.op_type == "MatMul"] == [  # type: ignore[union-attr]
        f"model.layers.{layer}.mlp.gate.weight.T" for layer in range(2)
    ]


def test_projections_of_one_input_are_one_product(quantized: Any, tmp_path: Path) -> None:
    lowered(quantized(requested("int4")), tmp_path)
    products = [node for node in ir.load(tmp_path / "model.onnx").graph if node.op_type == "MatMulNBits"]
    # q+k+v and the output projection in each of two layers, and the head.
    assert len(products) == 5


@pytest.mark.parametrize(
    ("formats", "limit"),
    [("int4", 1e-6), ("int4:asym", 1e-6), ("int4:fp32", 1e-6), ("int4 dynamic", 2e-2), ("int8", 2e-2)],
)
def test_the_artifact_computes_the_plan(formats: str, limit: float, quantized: Any, tmp_path: Path) -> None:
    name, _, dynamic = formats.partition(" ")
    plan = requested(name)
    if limit < 1e-5:
        # An 8-bit head would round its input.
        chosen = {key: str(fmt).replace("int8", "int4") for key, fmt in plan.formats}
        plan = QuantizationPlan.from_dict({"formats": chosen})
    program = quantized(with_activations(plan, Activations.INT8_DYNAMIC) if dynamic else plan)
    assert difference(lowered(program, tmp_path), program) <= limit


def test_dynamic_activations_reach_every_kernel(quantized: Any, tmp_path: Path) -> None:
    lowered(quantized(with_activations(requested("int4"), Activations.INT8_DYNAMIC)), tmp_path)
    levels = {
        node.attributes["accuracy_level"].as_int()
        for node in ir.load(tmp_path / "model.onnx").graph
        if node.op_type in {"QMoE", "MatMulNBits"}
    }
    assert levels == {4}


def test_a_tied_table_is_stored_once(quantized: Any, tmp_path: Path) -> None:
    program = quantized(requested("int4"))
    lowered(program, tmp_path)
    found = {
        name: value.const_value.offset  # type: ignore[union-attr]
        for name, value in ir.load(tmp_path / "model.onnx").graph.initializers.items()
        if "embed" in name
    }
    name = "model.embed_tokens.weight"
    assert found.keys() == {f"{name}.table", f"{name}.codes", f"{name}.scales"}
    assert found[f"{name}.table"] == found[f"{name}.codes"]


MIXED = {
    "other widths": {"experts_gate_up": "int4:32", "experts_down": "int8:32"},
    "one in floats": {"experts_gate_up": "int4:32"},
}


@pytest.mark.parametrize("formats", MIXED.values(), ids=MIXED)
def test_projections_that_qmoe_does_not_take_together_are_products_of_each_expert(
    formats: dict[str, str], quantized: Any, tmp_path: Path
) -> None:
    program = quantized(QuantizationPlan.from_dict({"formats": formats}))
    runner = lowered(program, tmp_path, profile=True)
    assert difference(runner, program) <= (2e-2 if "int8:32" in formats.values() else 1e-6)
    assert not {"QMoE", "MoE", "DequantizeLinear"} & runner.kernel_times().keys()


@pytest.mark.parametrize("formats", ["int4:32", "int4:32:asym", "int4:channel", "int8:channel"])
def test_a_gate_that_qmoe_does_not_have(formats: str, gated_gelu: Program, tmp_path: Path) -> None:
    """Gated GELU: every expert is two products with its codes, which are read back."""
    plan = QuantizationPlan.from_dict({"formats": {"experts_gate_up": formats, "experts_down": formats}})
    program = Quantize(plan).run(gated_gelu).program
    runner = lowered(program, tmp_path, profile=True)
    assert difference(runner, program) <= (2e-2 if "int8" in formats else 1e-6)
    products = [node for node in ir.load(tmp_path / "model.onnx").graph if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * sum(layer.num_experts for layer in program.layers)
    assert not {"QMoE", "MoE", "DequantizeLinear"} & runner.kernel_times().keys()
    stored = OnnxTarget().stored_weights(tmp_path)
    for layer in program.layers:
        for name in (layer.gate_up_proj, layer.down_proj):
            assert stored[name].bits == int(formats[3])
            want = program.weights[name].rows(1, 3).numpy()
            np.testing.assert_allclose(stored[name].values(1, 3), want, rtol=1e-6, atol=1e-8)


def test_an_expert_without_a_kernel_whose_slots_are_dropped_cannot_be_seen(gated_gelu: Program, tmp_path: Path) -> None:
    plan = QuantizationPlan.from_dict({"formats": {"experts_gate_up": "int4:32", "experts_down": "int4:32"}})
    program = Quantize(plan).run(gated_gelu).program
    lowered(program, tmp_path)
    layer, width = program.layers[0], program.layers[0].top_k
    hidden = np.random.default_rng(0).standard_normal((5, program.weights[layer.gate_up_proj].shape[-1]))
    indices = np.tile(np.arange(width), (5, 1))
    weights = np.where(indices == 0, 0.7, 0.0)
    run = OnnxExperts(tmp_path, threads=1)
    found = [
        run(0, hidden.astype(np.float32), numbers, weights.astype(np.float32))
        for numbers in (indices, np.where(indices == 0, 0, layer.num_experts - 1))
    ]
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0]).max() > 0


def test_a_tied_table_whose_rows_are_no_whole_blocks(tmp_path: Path) -> None:
    """The product reads rows that are filled up to whole blocks, the table rows as they are: these are two tensors."""
    checkpoint = write_tiny_checkpoint("olmoe", tmp_path / "model", hidden_size=40, tie_word_embeddings=True)
    program, _ = passes.run_passes(capture(Checkpoint.open(checkpoint)), passes.default_passes())
    program = Quantize(requested({"formats": {"lm_head": "int8"}})).run(program).program
    (tmp_path / "out").mkdir()
    assert difference(lowered(program, tmp_path / "out"), program) < 2e-2


def test_rows_of_int4_codes_that_end_within_a_byte(tmp_path: Path) -> None:
    """QMoE cannot be run with them, so each expert is two products, whose rows are filled up to whole blocks."""
    checkpoint = write_tiny_checkpoint("olmoe", tmp_path / "model", intermediate_size=17)
    program, _ = passes.run_passes(capture(Checkpoint.open(checkpoint)), passes.default_passes())
    program = Quantize(QuantizationPlan.from_dict({"formats": {"experts_down": "int4:channel"}})).run(program).program
    (tmp_path / "out").mkdir()
    assert difference(lowered(program, tmp_path / "out"), program) < 1e-6
    assert Comparisons(program, OnnxTarget().stored_weights(tmp_path / "out")).judge().status is Status.PASS
    both = QuantizationPlan.from_dict({"formats": {"experts_gate_up": "int4:channel", "experts_down": "int4:channel"}})
    assert not OnnxTarget().lint(Quantize(both).run(program).program, OnnxOptions())


def test_standard_ops_hold_codes_of_the_planned_width(quantized: Any, tmp_path: Path) -> None:
    program = quantized(QuantizationPlan.from_dict({"formats": {"attention": "int4", "lm_head": "int8"}}))
    runner = lowered(program, tmp_path, "portable")
    assert difference(runner, program) < 1e-4
    assert Comparisons(program, OnnxTarget().stored_weights(tmp_path)).judge().status is Status.PASS


def test_a_table_in_half_precision_can_be_read_back(checkpoint: Path, tmp_path: Path) -> None:
    """In a Program in half precision it needs no cast, and so has no other name than in one without quantization."""
    program, _ = passes.run_passes(capture(Checkpoint.open(checkpoint), dtype=torch.float16), passes.default_passes())
    program = Quantize(requested("fp16")).run(program).program
    lowered(program, tmp_path)
    name = "model.embed_tokens.weight"
    read = OnnxTarget().stored_weights(tmp_path)[name].rows(0, 4)
    assert np.array_equal(read, program.weights[name].rows(0, 4).half().numpy())


@pytest.mark.parametrize("name", ["int4", "int8", "fp16"])
def test_without_graph_optimization_the_logits_are_the_same(name: str, quantized: Any, tmp_path: Path) -> None:
    """Constants are stored as the kernels read them: what only becomes one by optimization is no constant to them."""
    program = quantized(requested(name))
    runner = lowered(program, tmp_path)
    want = runner.prefill(IDS)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    plain = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": np.arange(IDS.shape[1])[None]}
    for spec in plain.get_inputs():
        if spec.name not in feeds:
            sizes = [IDS.shape[0], *(size if isinstance(size, int) else 0 for size in spec.shape[1:])]
            feeds[spec.name] = np.zeros(sizes, np.float32)
    feeds["position_ids"] = np.repeat(feeds["position_ids"], len(IDS), axis=0)
    named = {spec.name for spec in plain.get_inputs()}
    got = plain.run(["logits"], {key: value for key, value in feeds.items() if key in named})[0]
    assert np.abs(want).max() > 0
    # QMoE takes fp16 scales by a Cast that the runtime adds; without optimization it then computes in float32.
    np.testing.assert_allclose(got, want, atol=(2e-2 if name == "int8" else 1e-3) * np.abs(want).max())
    graph = ir.load(tmp_path / "model.onnx").graph
    kernels = [node for node in graph if node.domain == "com.microsoft" and node.op_type in QUANTIZED]
    constants = [value for node in kernels for value in node.inputs[1:] if value is not None and value.producer()]
    indices = {node.inputs[1] for node in kernels if node.op_type == "GatherBlockQuantized"}
    routed = {value for node in kernels if node.op_type == "QMoE" for value in (node.inputs[1], node.inputs[14])}
    assert set(constants) <= indices | routed


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_quantized_experts_in_standard_ops_are_refused(name: str, quantized: Any) -> None:
    refused = OnnxTarget().lint(quantized(requested(name)), OnnxOptions(flavor=Flavor.PORTABLE))
    assert [item.where for item in refused] == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    assert f"experts in {name}" in refused[0].reason


def test_scales_that_an_fp16_graph_would_round_are_refused(checkpoint: Path) -> None:
    halves, _ = passes.run_passes(capture(Checkpoint.open(checkpoint), dtype=torch.float16), passes.default_passes())
    program = Quantize(requested("int4:32:fp32")).run(halves).program
    refused = OnnxTarget().refusals(program, OnnxOptions())
    assert {"scales of fp16" in item.reason for item in refused} == {True}
    assert not OnnxTarget().refusals(Quantize(requested("int4:32")).run(halves).program, OnnxOptions())


def test_what_lowering_refuses_lint_refuses(quantized: Any) -> None:
    """Whatever it is: here zero points, which the standard form of a linear has not."""
    plan = QuantizationPlan.from_dict({"formats": {"attention": "int4:32:asym"}})
    program = quantized(plan)
    (refused,) = OnnxTarget().lint(program, OnnxOptions(flavor=Flavor.PORTABLE))
    assert "zero points are not supported in standard ops" in refused.reason
    assert refused.where.startswith("model.layers.0.self_attn")
