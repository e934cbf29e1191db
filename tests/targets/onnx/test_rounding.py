"""How ONNX Runtime rounds activations is known, and the reference of the gates rounds in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from moec import passes
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.coverage import run_every_expert
from moec.compiler.gates.reference import Oracle
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.passes.quantize import Quantize
from moec.quantize.formats import Activations
from moec.quantize.plan import QuantizationPlan, requested, with_activations
from moec.targets.onnx import rounding
from moec.targets.onnx.experts import OnnxExperts
from moec.targets.onnx.runner import OnnxRunner
from moec.targets.onnx.stored import TABLE
from moec.targets.onnx.target import Experts, Flavor, OnnxOptions, OnnxTarget

IDS = np.random.default_rng(0).integers(3, 128, (2, 40))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Widths that blocks of 32 divide, and a head that is tied to the embedding."""
    directory = tmp_path_factory.mktemp("tied")
    tiny_model("qwen2_moe", intermediate_size=96, moe_intermediate_size=32).save_pretrained(directory)
    return passes.run_passes(capture(Checkpoint.open(directory)), passes.default_passes())[0]


@pytest.fixture
def lowered(program: Program, tmp_path: Path) -> Callable[..., tuple[Program, Path]]:
    def lower(plan: QuantizationPlan, flavor: str = "default") -> tuple[Program, Path]:
        quantized = Quantize(plan).run(program).program
        # Without it, the flavor for browsers computes with floats.
        experts = Experts.KERNEL if flavor == "web" else Experts.AUTO
        OnnxTarget().lower(quantized, OnnxOptions(flavor=Flavor(flavor), experts=experts), tmp_path, lambda *_: None)
        return quantized, tmp_path

    return lower


def dynamic(name: str) -> QuantizationPlan:
    return with_activations(requested(name), Activations.INT8_DYNAMIC)


def errors(directory: Path, program: Program, known: Any) -> float:
    """Difference of most positions from the interpreter that rounds as `known`, relative to the largest logit."""
    reference, runner = ProgramRunner(program, rounding=known), OnnxRunner(directory, threads=1)
    want, found = (
        np.concatenate([one.prefill(IDS[:, :-1]), one.decode(IDS[:, -1:])], 1) for one in (reference, runner)
    )
    return float(np.median(np.abs(found - want).max(-1) / np.abs(want).max()))


@pytest.mark.parametrize("kernel", ["MatMulNBits", "QMoE"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_kernels_round_each_block_by_its_largest_value(kernel: str, bits: int, block: int) -> None:
    assert rounding.rounds_blocks(kernel, bits, block)


def test_another_rounding_of_the_machine_is_not_taken_for_this_one(
    lowered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor whose kernels round whole rows: the gates then use the wider limit."""
    rounding.rounds_blocks.cache_clear()
    monkeypatch.setattr(rounding, "round_blocks_to_int8", lambda values, _: values)
    _, directory = lowered(dynamic("int8"))
    assert not rounding.rounds_blocks("QMoE", 8, 32)
    assert OnnxTarget().activation_rounding(directory) is None
    rounding.rounds_blocks.cache_clear()


@pytest.mark.parametrize("plan", [dynamic("int4"), dynamic("int8"), dynamic("int8:channel"), requested("int4")])
@pytest.mark.parametrize("flavor", ["default", "genai", "web"])
def test_the_reference_rounds_as_the_artifact(plan: QuantizationPlan, flavor: str, lowered: Any) -> None:
    """The preset int4 with float activations has a head of 8 bits, whose kernel rounds."""
    quantized, directory = lowered(plan, flavor)
    known = OnnxTarget().activation_rounding(directory)
    assert errors(directory, quantized, known) < 2e-5 < 1e-3 < errors(directory, quantized, None)


def test_weights_that_are_decoded_round_nothing(program: Program, tmp_path: Path) -> None:
    quantized = Quantize(dynamic("int4")).run(program).program
    OnnxTarget().lower(quantized, OnnxOptions(flavor=Flavor.WEB), tmp_path, lambda *_: None)
    for known in (None, OnnxTarget().activation_rounding(tmp_path)):
        assert errors(tmp_path, quantized, known) < 2e-5


def test_every_expert_is_within_a_hundredth_of_its_limit(lowered: Any) -> None:
    quantized, directory = lowered(dynamic("int4"))
    known = OnnxTarget().activation_rounding(directory)
    oracle = Oracle(quantized, 0.0, rounding=known)
    oracle.trace(IDS)
    found = run_every_expert(quantized, {"model": OnnxExperts(directory)}, oracle.hidden.rows, rounding=known)
    assert np.median([error for layer in found for error in layer.errors.values()]) < 1e-5


def test_standard_ops_round_nothing(lowered: Any) -> None:
    plan = requested({"formats": {"attention": "int8", "lm_head": "int8"}})
    quantized, directory = lowered(plan, "portable")
    known = OnnxTarget().activation_rounding(directory)
    assert known is not None
    values = torch.randn(2, 64)
    assert known(quantized.weights["model.layers.0.self_attn.q_proj.weight"], values) is values
    assert errors(directory, quantized, known) < 1e-5


def test_an_artifact_that_does_not_say_what_rounds_is_not_guessed_at(lowered: Any) -> None:
    _, directory = lowered(dynamic("int8"))
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    (entry,) = [item for item in model.metadata_props if item.key == TABLE]
    table = json.loads(entry.value)
    for row in table.values():
        row.pop("rounded_by", None)
    entry.value = json.dumps(table)
    onnx.save(model, directory / "model.onnx")
    assert OnnxTarget().activation_rounding(directory) is None


@pytest.mark.parametrize(("hidden", "width", "expected"), [(64, 40, [True, False]), (64, 32, [True, True])])
def test_experts_with_a_shorter_last_block_do_not_round(
    hidden: int, width: int, expected: list[bool], tmp_path: Path
) -> None:
    model = tiny_model("olmoe", hidden_size=hidden, intermediate_size=width)
    model.save_pretrained(tmp_path / "model")
    program = passes.run_passes(capture(Checkpoint.open(tmp_path / "model")), passes.default_passes())[0]
    quantized = Quantize(dynamic("int8:channel")).run(program).program
    OnnxTarget().lower(quantized, OnnxOptions(), tmp_path, lambda *_: None)
    known = OnnxTarget().activation_rounding(tmp_path)
    assert known is not None
    weights = [quantized.weights[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down")]
    values = [torch.randn(2, weight.shape[-1]) for weight in weights]
    assert [known(weight, value) is not value for weight, value in zip(weights, values, strict=True)] == expected
    oracle = Oracle(quantized, 0.0, rounding=known)
    oracle.trace(IDS)
    found = run_every_expert(quantized, {"model": OnnxExperts(tmp_path)}, oracle.hidden.rows, rounding=known)
    assert np.median([error for layer in found for error in layer.errors.values()]) < 1e-5
