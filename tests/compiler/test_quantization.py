"""Quantization through the pipeline: recipe to artifact."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.api import export
from moec.compiler.errors import UsageError
from moec.compiler.interpreter import ProgramRunner
from moec.compiler.pipeline import build_program
from moec.compiler.recipe import make_recipe
from moec.targets import get_target


@pytest.fixture(scope="module")
def artifact(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("int4") / "out"
    sections: dict[str, Any] = {"quantize": {"format": "int4", "rounding": "rtn"}}
    export(golden_model, target="onnx", output=directory, gates=False, **sections)
    return directory


def test_the_manifest_says_what_was_quantized(artifact: Path) -> None:
    recorded = json.loads((artifact / "moec.json").read_text())["quantization"]
    assert recorded["classes"]["experts_down"]["formats"] == {"int4:128": 4}
    assert recorded["classes"]["router"] == {"formats": {"none": 4}}
    assert recorded["rounding"] == "rtn"


def test_int4_experts_take_less_than_a_third_of_half_precision(artifact: Path) -> None:
    manifest = json.loads((artifact / "moec.json").read_text())
    halves = 4 * 16 * 3 * 256 * 128 * 2
    assert sum(manifest["facts"]["expert_tensor_bytes"].values()) <= 0.30 * halves


def test_the_artifact_computes_the_quantized_program(artifact: Path, golden_model: Path) -> None:
    fields = {"checkpoint": str(golden_model), "target": "onnx", "quantize": {"format": "int4", "rounding": "rtn"}}
    reference = ProgramRunner(build_program(make_recipe(fields)))
    ids = np.arange(3, 33).reshape(2, 15)
    want, found = (runner.prefill(ids) for runner in (reference, get_target("onnx").open(artifact, threads=1)))
    # The 8-bit head rounds its input.
    assert np.abs(found - want).max() <= 2e-2 * np.abs(want).max()


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
