"""Codes that calibration chose are recorded at export, and `moec validate` judges them without calibrating again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import cli
from moec.compiler.api import export
from moec.compiler.common.artifact import read_manifest, write_manifest
from moec.compiler.common.errors import ArtifactError
from moec.compiler.families.tiny_models import tiny_model, write_tiny_checkpoint
from moec.compiler.ir.weights import Constant
from moec.compiler.pipeline import quantization
from moec.compiler.pipeline.recorded_codes import read_in_format, recorded_codes
from moec.quantize.formats import IntegerFormat
from moec.quantize.methods.rounding import round_to_nearest
from moec.quantize.methods.tensors import QuantizedTensor
from moec.quantize.recorded import Recorded, RecordedCodes, sha256_of
from moec.targets.stored_weights import Codes, StoredWeight

LITTLE = {"windows": 6, "window": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint("olmoe", directory, tokenizer=True)
    tiny_model("olmoe", intermediate_size=64).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX artifact in the formats that `auto` chose, rounded on a text that is gone."""
    directory = tmp_path_factory.mktemp("artifact")
    text = directory / "text.txt"
    text.write_text("In the beginning was the word, and the word was written down. " * 40)
    wanted = {"format": "auto", "max_size": "0.32x", "rounding": "gptq", "calibration": str(text), **LITTLE}
    export(checkpoint, target="onnx", output=directory / "out", quantize=wanted, gates=False)
    text.unlink()
    return directory / "out"


def validated(artifact: Path, checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Exit code, and the verdicts by gate."""
    code = cli.dispatch(["validate", str(artifact), "--against", str(checkpoint), "-q"])
    report = json.loads((artifact / "report.json").read_text())
    return code, {verdict["gate"]: verdict for verdict in report["verdicts"]}


def test_validate_neither_calibrates_nor_chooses(
    artifact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("calibration is run again")

    for name in ("calibrate", "choose", "calibration_text"):
        monkeypatch.setattr(quantization, name, forbidden)
    before = (artifact / "moec.json").read_bytes()
    assert str(artifact.parent) not in before.decode()
    code, verdicts = validated(artifact, checkpoint)
    assert code == 0
    assert {gate for gate, verdict in verdicts.items() if verdict["status"] != "pass"} == {"quality", "latency"}
    said = verdicts["integrity"]["summary"]
    assert "tensors with calibrated codes: equal to the digests in moec.json, in the plan's format, at most 0." in said
    codes = read_manifest(artifact)["quantization"]["codes"]
    assert {entry["name"] for entry in verdicts["integrity"]["figures"]["read_back"]} == codes.keys()
    assert (artifact / "moec.json").read_bytes() == before


@pytest.fixture
def tampered(artifact: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy whose data file was changed, with digests of its files that fit."""

    def change(edit: Callable[[Path], None]) -> Path:
        copy = tmp_path / "tampered"
        copy.mkdir()
        for path in artifact.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        edit(copy)
        manifest = read_manifest(artifact)
        content = {key: value for key, value in manifest.items() if key not in {"schema_version", "files", "digest"}}
        write_manifest(copy, content)
        return copy

    return change


def codes_of(directory: Path, name: str) -> np.ndarray:
    """The bytes of the codes of a weight, mapped so that they can be changed."""
    import onnx_ir as ir

    tensor = ir.load(directory / "model.onnx").graph.initializers[f"{name}.codes"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    shape = tuple(int(size) for size in tensor.shape.numpy())
    return np.memmap(tensor.path, np.uint8, "r+", offset=tensor.offset or 0, shape=shape)


def test_a_code_that_was_changed_is_not_the_recorded_one(tampered: Callable[..., Path], checkpoint: Path) -> None:
    stack = "model.layers.0.mlp.experts.down_proj"

    def one_step(directory: Path) -> None:
        codes_of(directory, stack)[3, 5, 7] ^= 1

    code, verdicts = validated(tampered(one_step), checkpoint)
    assert code == 5
    assert verdicts["integrity"]["status"] == "fail"
    assert verdicts["integrity"]["summary"] == f"codes that moec.json does not record: {stack}"
    # The step is too small for parity, which compares with the codes that are there.
    assert verdicts["parity: artifact"]["status"] == "pass"


FMT = IntegerFormat(4, 32)


def tensor(**parts: Any) -> QuantizedTensor:
    fields = {"codes": torch.zeros(2, 64, dtype=torch.int8), "scales": torch.full((2, 2), 0.5, dtype=torch.float16)}
    return QuantizedTensor(FMT, **{**fields, **parts})


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 64), np.float32), "holds floats"),
        (Codes(4, np.full((2, 64), 9, np.int8), np.ones((2, 2)), 32), r"codes outside of -8 \.\. 7"),
        (Codes(4, np.zeros((2, 64), np.int8), np.ones((2, 1)), 64), "several scales in a block"),
        (Codes(4, np.zeros((2, 64), np.int8), np.array([[1, 1, 1, 2]] * 2), 16), "several scales in a block"),
        (Codes(4, np.zeros((2, 64), np.int8), np.full((2, 2), 0.1), 32), "scales that int4:32 cannot hold"),
        (Codes(4, np.zeros((2, 64), np.int8), np.zeros((2, 2)), 32), "scales that int4:32 cannot hold"),
        (Codes(4, np.zeros((2, 64), np.int8), np.ones((2, 2)), 32, np.ones((2, 2), np.int8)), "has zero points"),
        (Codes(4, np.zeros((2, 64), np.uint8), table=np.zeros((1, 16))), "looks its values up in a table"),
    ],
)
def test_codes_on_another_grid_are_refused(codes: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"w: the artifact .*{message}"):
        read_in_format("w", StoredWeight(4, lambda start, stop: codes), 0, 2, FMT)  # noqa: ARG005


def test_scales_of_smaller_blocks_and_of_more_bits_are_the_plans() -> None:
    wide = Codes(4, np.ones((2, 64), np.int8), np.repeat(np.float32([[0.5, 0.25]] * 2), 2, -1), 16)
    found = read_in_format("w", StoredWeight(4, lambda start, stop: wide), 0, 2, FMT)  # noqa: ARG005
    assert found.scales.dtype is torch.float16
    assert found.scales.tolist() == [[0.5, 0.25]] * 2
    assert sha256_of([found]) == sha256_of([tensor(codes=found.codes, scales=found.scales.float())])


@pytest.mark.parametrize(
    "other",
    [
        {"codes": torch.ones(2, 64, dtype=torch.int8)},
        {"scales": torch.full((2, 2), 0.25, dtype=torch.float16)},
    ],
)
def test_the_digest_is_of_codes_and_scales(other: dict[str, Any]) -> None:
    assert sha256_of([tensor()]) == sha256_of([tensor()]) != sha256_of([tensor(**other)])


def test_one_row_of_another_matrix_is_too_far() -> None:
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, FMT, name="w").tensor

    def near(codes: torch.Tensor) -> bool:
        taken = QuantizedTensor(FMT, codes, rounded.scales)
        recorded = RecordedCodes(lambda start, stop, fmt: taken, "")  # noqa: ARG005
        return Recorded("w", Constant(weight), FMT, recorded=recorded).examine().near

    assert near(rounded.codes)
    assert not near(rounded.codes.roll(1, 0))
    assert not near(torch.cat([rounded.codes[1:2], rounded.codes[1:]]))


def test_an_artifact_of_calibrated_codes_without_record_is_damaged(tmp_path: Path) -> None:
    def codes(facts: dict[str, Any]) -> Mapping[str, RecordedCodes]:
        return recorded_codes(NoTarget(), tmp_path, {"quantization": facts})  # type: ignore[arg-type]

    assert codes({"rounding": "rtn"}) == {}
    with pytest.raises(ArtifactError, match="does not record the codes"):
        codes({"calibration": {}})
    with pytest.raises(ArtifactError, match="the codes of w"):
        codes({"calibration": {}, "codes": {"w": ""}})


class NoTarget:
    """A target that gives nothing back."""

    def stored_weights(self, _: Path) -> dict[str, StoredWeight]:
        return {}
