"""Quantization through the pipeline: recipe to artifact."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.api import export
from moec.compiler.common.errors import CheckpointError, UsageError
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.pipeline import quantization
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.program import build, build_program, target_of, with_target_defaults
from moec.compiler.pipeline.recipe import make_recipe
from moec.compiler.pipeline.stages import Stages, silent
from moec.quantize.lazy import Coded
from moec.quantize.methods.gptq import GptqOptions
from moec.quantize.methods.scales import NO_CLIPPING, ClipSearch
from moec.quantize.planning.sensitivity import Rounding
from moec.targets import get_target


@pytest.fixture(scope="module")
def artifact(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("int4") / "out"
    sections: dict[str, Any] = {"quantize": {"format": "int4", "rounding": "rtn"}}
    export(golden_model, target="onnx", output=directory, gates=False, **sections)
    return directory


def test_the_manifest_says_what_was_quantized(artifact: Path) -> None:
    recorded = json.loads((artifact / "moec.json").read_text())["quantization"]
    assert recorded["classes"]["experts_down"]["formats"] == {"int4:128:int8-dynamic": 4}
    assert recorded["classes"]["router"] == {"formats": {"none": 4}}
    assert recorded["rounding"] == "rtn"


def test_int4_experts_take_less_than_a_third_of_half_precision(artifact: Path) -> None:
    manifest = json.loads((artifact / "moec.json").read_text())
    halves = 4 * 16 * 3 * 256 * 128 * 2
    assert sum(manifest["facts"]["expert_tensor_bytes"].values()) <= 0.30 * halves


def test_the_artifact_computes_the_quantized_program(artifact: Path, golden_model: Path) -> None:
    fields = {"checkpoint": str(golden_model), "target": "onnx", "quantize": {"format": "int4", "rounding": "rtn"}}
    rounding = get_target("onnx").activation_rounding(artifact)
    reference = ProgramRunner(build_program(make_recipe(fields)), rounding=rounding)
    ids = np.arange(3, 33).reshape(2, 15)
    want, found = (runner.prefill(ids) for runner in (reference, get_target("onnx").open(artifact, threads=1)))
    # Of activations that lie between two codes, rounding in float32 decides.
    differences = np.abs(found - want).max(-1) / np.abs(want).max()
    assert np.median(differences) <= 5e-3
    assert differences.max() <= 2e-2


CAPTURES = Captures()


@pytest.mark.parametrize(
    ("target", "options", "activations", "rounded"),
    [
        ("onnx", {}, None, True),
        ("onnx", {}, "auto", True),
        ("onnx", {}, "float", False),
        ("onnx", {"flavor": "portable"}, None, False),
        ("onnx", {"flavor": "portable"}, "int8-dynamic", True),
        ("coreml", {}, None, False),
        ("tensorrt", {}, None, False),
        ("tflite", {}, None, True),
        ("tflite", {}, "float", True),
    ],
)
def test_activations_are_those_with_which_the_target_is_fastest(
    tiny_checkpoint: Callable[[str], Path], target: str, options: Any, activations: str | None, rounded: bool
) -> None:
    """With `float` the formats stay as they are, and LiteRT's presets name int8-dynamic themselves."""
    quantize = {"format": "int8", "rounding": "rtn"} | ({} if activations is None else {"activations": activations})
    fields = {"checkpoint": str(tiny_checkpoint("olmoe")), "target": target, "options": options, "quantize": quantize}
    recipe = make_recipe(fields)
    own, chosen = target_of(recipe)
    built = build(with_target_defaults(recipe, own), own, chosen, Stages(silent), CAPTURES)
    weight = built.program.weights["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(weight, Coded)
    assert ("int8-dynamic" in str(weight.format)) == rounded
    assert built.quantization.recorded is not None
    # What a recipe says when the artifact is built again gives the same formats, whatever the default is then.
    again = make_recipe({**fields, "quantize": built.quantization.recorded})
    repeated = build(again, own, chosen, Stages(silent), CAPTURES).program.weights
    assert str(repeated["model.layers.0.self_attn.q_proj.weight"].format) == str(weight.format)  # type: ignore[attr-defined]
    assert built.quantization.recorded["activations"] != "auto"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("int5", "int5"),
        ({"formats": {"router": "int8"}}, "router"),
        ({"formats": {"atention": "int8"}}, "atention"),
    ],
)
def test_a_wrong_plan_is_named(golden_model: Path, tmp_path: Path, chosen: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        export(golden_model, target="onnx", output=tmp_path / "out", gates=False, quantize={"format": chosen})
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text is empty"),
        (b" \n ", "the text is empty"),
        (b"\x7fELF\x02\x01\0\0", "a binary file"),
        (b"caf\xe9 au lait", "not UTF-8"),
        (b"Three short words.", "fewer than one window of 256"),
        (None, "cannot be read"),
    ],
)
def test_calibration_text_that_does_not_serve_is_named(
    golden_model: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    quantize = {"format": "int4", "rounding": "gptq", "calibration": str(path)}
    with pytest.raises(CheckpointError, match=message) as error:
        export(golden_model, target="onnx", output=tmp_path / "out", gates=False, quantize=quantize)
    assert error.value.exit_code == 10
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_a_block_that_does_not_divide_is_named(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"down_proj: block size 32 .* divide its dimension 48") as error:
        export(tiny_checkpoint("olmoe"), target="onnx", output=tmp_path / "out", gates=False, quantize="int8:32")
    assert "int8:channel" in error.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("chosen", ["int4", "int8:channel"])
def test_a_width_that_no_block_divides_has_a_scale_for_each_row(chosen: str, tmp_path: Path) -> None:
    tiny_model("olmoe", intermediate_size=40).save_pretrained(tmp_path / "model")
    quantize = {"format": chosen, "rounding": "rtn"}
    result = export(tmp_path / "model", target="onnx", output=tmp_path / "out", quantize=quantize)
    assert {"coverage", "integrity"} <= {verdict.gate for verdict in result.verdicts if verdict.status == "pass"}
    formats = result.manifest["quantization"]["classes"]["experts_down"]["formats"]
    assert list(formats) == [f"{chosen.partition(':')[0]}:channel:int8-dynamic"]


def test_experts_that_are_zero_or_constant_are_quantized_exactly(tmp_path: Path) -> None:
    model = tiny_model("olmoe", intermediate_size=64)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    with torch.no_grad():
        experts.gate_up_proj[1] = 0  # type: ignore[index, operator]
        experts.down_proj[2] = 0.25  # type: ignore[index, operator]
    model.save_pretrained(tmp_path / "checkpoint")
    quantize = {"format": "int4", "rounding": "rtn"}
    recipe = {"checkpoint": str(tmp_path / "checkpoint"), "target": "onnx", "quantize": quantize}
    result = export(**recipe, output=tmp_path / "out")
    assert {verdict.gate: str(verdict.status) for verdict in result.verdicts}["integrity"] == "pass"
    stored = get_target("onnx").stored_weights(tmp_path / "out")
    name = "model.layers.0.mlp.experts.{}_proj"
    assert not stored[name.format("gate_up")].values(1, 2).any()
    assert np.allclose(stored[name.format("down")].values(2, 3), 0.25, rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    model = tiny_model("olmoe", intermediate_size=64)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.experts").down_proj[3, 0, 0] = value  # type: ignore[index, operator]
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.3\.down_proj.* NaN or infinity"):
        export(tmp_path / "checkpoint", target="onnx", output=tmp_path / "out", gates=False, quantize="int4:32")
    assert not (tmp_path / "out").exists()


def test_auto_chooses_among_what_the_target_computes_with(golden_model: Path, tmp_path: Path) -> None:
    """LiteRT takes a table of one scale per row alone, int8 experts of no other kind, and int4 in blocks."""
    wanted = {"format": "auto", "rounding": "rtn", "max_size": "0.33x", "windows": 2, "window": 32}
    options = {"prefill": (16,), "context": 64}
    result = export(
        golden_model, target="tflite", output=tmp_path / "out", quantize=wanted, options=options, gates=False
    )
    parts = result.manifest["quantization"]["auto"]["parts"]
    assert parts["embedding"]["format"] == "int8:channel:fp32:int8-dynamic"
    assert parts["experts.0"]["loss"].keys() == {
        "fp16",
        "int8:channel:fp32:int8-dynamic",
        *(f"int4:{block}:bf16:int8-dynamic" for block in (32, 64, 128)),
    }


@pytest.mark.parametrize(("rounding", "clip"), [("rtn", NO_CLIPPING), ("gptq", GptqOptions().clip)])
def test_auto_predicts_with_the_scales_that_rounding_chooses(
    rounding: str, clip: ClipSearch, golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: Any, rounding: Rounding, **_others: Any) -> None:
        raise UsageError(f"clip {rounding.clip}")

    monkeypatch.setattr(quantization, "choose", stop)
    wanted = {"format": "auto", "rounding": rounding, "max_size": "0.5x"}
    with pytest.raises(UsageError) as caught:
        export(golden_model, target="onnx", output=tmp_path / "out", quantize=wanted, gates=False)
    assert str(caught.value) == f"clip {clip}"
