"""A KV cache in int8 from the recipe to the artifact, and what cannot have one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moec import cli
from moec.compiler.api import export
from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.errors import ArtifactError, LoweringError
from moec.compiler.ir import ops
from moec.compiler.measure.estimate.counting import count
from moec.compiler.pipeline import quantization
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.program import build_program
from moec.compiler.pipeline.recipe import make_recipe
from moec.compiler.pipeline.recorded_codes import recorded_calibration
from moec.compiler.report.describe import describe
from moec.compiler.report.inspect import inspect
from moec.compiler.run.generate import Generator
from moec.quantize.kv_cache import sha256_of_scale
from moec.targets import get_target

LITTLE: dict[str, Any] = {"kv_cache": "int8", "windows": 4, "window": 64}
STATES, BYTES = 8, 256
"""Keys and values of four layers, and the bytes of one of them in a token: 256 channels in all heads together."""


@pytest.fixture(scope="module")
def artifact(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose scales were measured on a text that is gone."""
    directory = tmp_path_factory.mktemp("int8")
    text = directory / "text.txt"
    text.write_text("In the beginning was the word, and the word was written down. " * 40)
    wanted = {**LITTLE, "calibration": str(text)}
    result = export(golden_model, target="onnx", output=directory / "out", flavor="genai", quantize=wanted)
    assert not result.failed
    text.unlink()
    return directory / "out"


def test_the_manifest_says_how_the_scales_were_found(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    found = manifest["quantization"]["kv_cache"]
    assert {key: found[key] for key in ("format", "windows", "length")} == {
        "format": "int8",
        "windows": 4,
        "length": 64,
    }
    assert len(found["scales"]) == STATES
    section = manifest["recipe"]["quantize"]
    assert (section["kv_cache"], section["format"], section["calibration"]) == ("int8", "none", None)
    assert section["calibration_sha256"] == found["sha256"]
    assert manifest["model"]["states"]["bytes_per_token"] == STATES * BYTES
    assert manifest["model"]["states"]["cache_dtypes"] == ["int8"]
    names = {item["name"] for item in manifest["passes"] if item["modified"]}
    assert "quantize-cache" in names
    assert "quantize" not in names


def test_validate_reads_the_scales_back(artifact: Path, golden_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the scales are measured again")

    for name in ("measure_scales", "calibration_text"):
        monkeypatch.setattr(quantization, name, forbidden)
    before = (artifact / "moec.json").read_bytes()
    assert cli.dispatch(["validate", str(artifact), "--against", str(golden_model), "-q"]) == 0
    verdicts = {item["gate"]: item for item in json.loads((artifact / "report.json").read_text())["verdicts"]}
    assert {gate for gate, item in verdicts.items() if item["status"] != "pass"} == {"quality", "latency"}
    assert verdicts["parity: artifact"]["figures"]["precision"] == "int8-cache"
    assert verdicts["coverage"]["summary"].count("fp32") == 1
    assert (artifact / "moec.json").read_bytes() == before


def test_parity_finds_codes_that_are_cut_off_in_place_of_rounded(
    artifact: Path, golden_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(values: Tensor, scale: Tensor) -> Tensor:
        return (values.float() / scale[:, None]).trunc().clamp(-128, 127).to(torch.int8)

    monkeypatch.setattr(ops, "to_codes", cut_off)
    assert cli.dispatch(["validate", str(artifact), "--against", str(golden_model), "-q"]) == 5
    verdicts = json.loads((artifact / "report.json").read_text())["verdicts"]
    assert [item["gate"] for item in verdicts if item["status"] == "fail"] == ["parity: artifact"]


def test_scales_that_moec_json_does_not_record_are_an_error(artifact: Path) -> None:
    target, manifest = get_target("onnx"), json.loads((artifact / "moec.json").read_text())
    found = recorded_calibration(target, artifact, manifest)
    facts = manifest["quantization"]["kv_cache"]
    assert {name: sha256_of_scale(scale) for name, scale in found.cache_scales.items()} == facts["scales"]
    wrong = {"quantization": {"kv_cache": {**facts, "scales": {"past_key_values.0.key": "0" * 64}}}}
    with pytest.raises(ArtifactError, match="is not what") as caught:
        recorded_calibration(target, artifact, wrong)
    assert caught.value.exit_code == 9
    with pytest.raises(ArtifactError, match="is missing"):
        recorded_calibration(target, artifact, {"quantization": {"kv_cache": {**facts, "scales": {"past.9": ""}}}})
    with pytest.raises(ArtifactError, match="does not record the scales"):
        recorded_calibration(target, artifact, {"quantization": {"kv_cache": {}}})


def test_it_is_described_and_generates(artifact: Path) -> None:
    rows = dict(describe(inspect(str(artifact))))
    assert rows["states"].startswith("8 (key, value), the KV cache in int8, 2.05 kB per token")
    assert "int8: KV cache" in (artifact / "README.md").read_text()
    generator = Generator(artifact)
    assert generator.rounds_coarsely
    first, second = (generator.generate("The function", max_new_tokens=8) for _ in range(2))
    assert first == second


def test_two_exports_are_the_same_bytes(artifact: Path, golden_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and the word was written down. " * 40)
    wanted = {**LITTLE, "calibration": str(text)}
    export(golden_model, target="onnx", output=tmp_path / "out", flavor="genai", quantize=wanted, gates=False)
    for name in ("moec.json", "model.onnx", "model.onnx_data"):
        assert (tmp_path / "out" / name).read_bytes() == (artifact / name).read_bytes()


def test_weights_and_cache_together(golden_model: Path) -> None:
    fields = {"checkpoint": str(golden_model), "target": "onnx", "options": {"flavor": "genai"}}
    wanted = {**LITTLE, "format": "int8", "rounding": "rtn"}
    captures = Captures()
    program = build_program(make_recipe({**fields, "quantize": wanted}), captures)
    plain = build_program(make_recipe({**fields, "quantize": {**wanted, "kv_cache": "float"}}), captures)
    counts, floats = count(program), count(plain)
    assert counts.state_bytes * 4 == floats.state_bytes
    assert counts.state_flops == floats.state_flops
    assert counts.parameters == floats.parameters


def test_a_model_that_the_flavor_refuses_is_refused_before_the_text_is_read(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with different numbers of heads. The checkpoint has no tokenizer, which would be another error."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the text is read")

    monkeypatch.setattr(quantization, "_calibration_windows", forbidden)
    with pytest.raises(LoweringError, match="same number of heads"):
        export(
            tiny_checkpoint("mimo_v2_flash"), target="onnx", output=tmp_path / "out", flavor="genai", quantize=LITTLE
        )
