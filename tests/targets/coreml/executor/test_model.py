"""Opening packages, descriptors, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.common.errors import ArtifactError, LoweringError, MissingExtraError, UsageError
from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.executor.blob import BlobFile
from moec.targets.coreml.executor.dtypes import BY_NAME
from moec.targets.coreml.library import coremltools_module

RNG = np.random.default_rng(6)
WEIGHT = RNG.standard_normal((8, 8)).astype(np.float32)
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture(scope="module")
def saved(builder: Any) -> Path:
    path: Path = builder.save(
        {"x": builder.placeholder((2, 8))}, lambda x: builder.mb.linear(x=x, weight=WEIGHT, name="y")
    )
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy.mlpackage")


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"was given the inputs \[\]"),
        ({"x": np.zeros((2, 8)), "z": np.zeros(1)}, r"\['x', 'z'\]"),
        ({"x": np.zeros((3, 8))}, r"input x was given shape \(3, 8\)"),
    ],
)
def test_wrong_inputs_are_refused(saved: Path, feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        MilModel.open(saved).session().predict(feeds)
    assert "x: fp32[2, 8]" in caught.value.hint


@pytest.mark.parametrize(("ids", "message"), [([0.5], "float64"), ([1 << 40], "values that int32 cannot")])
def test_integers_must_be_integers_that_fit(builder: Any, ids: list[Any], message: str) -> None:
    path = builder.save({"ids": builder.placeholder((1,), np.int32)}, lambda ids: builder.mb.add(x=ids, y=1, name="y"))
    session = MilModel.open(path).session()
    np.testing.assert_array_equal(session.predict({"ids": [4]})["y"], [5])
    with pytest.raises(UsageError, match=message):
        session.predict({"ids": ids})


def test_flexible_shapes(builder: Any) -> None:
    ct, mb = builder.ct, builder.mb
    symbol = builder.mil.get_new_symbol()
    inputs = {"x": builder.placeholder((1, symbol)), "z": builder.placeholder((2, 3))}
    program = builder.mil.Program()
    program.add_function("main", builder.function(inputs, lambda x, **_: mb.add(x=x, y=1.0, name="y")))
    with builder.quiet():
        model = ct.convert(
            program,
            inputs=[ct.TensorType("x", shape=(1, ct.RangeDim(1, 5))), ct.TensorType("z", shape=(2, 3))],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        path = builder.directory / "flexible.mlpackage"
        model.save(str(path))
        del model
    session = MilModel.open(path).session()
    z = np.zeros((2, 3))
    for length in (1, 5):
        assert session.predict({"x": np.zeros((1, length)), "z": z})["y"].shape == (1, length)
    with pytest.raises(UsageError, match="shape") as caught:
        session.predict({"x": np.zeros((1, 6)), "z": z})
    assert "(1, 5)" in caught.value.hint


def test_an_op_without_a_kernel_is_named_before_anything_runs(builder: Any) -> None:
    mb = builder.mb
    x = builder.placeholder((1, 4, 4, 4))
    path = builder.save(
        {"x": x},
        lambda x: mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=x), y=0.0),
            _true_fn=lambda: mb.depth_to_space(x=x, block_size=2, name="spread"),
            _false_fn=lambda: mb.reshape(x=x, shape=[1, 1, 8, 8]),
        ),
    )
    with pytest.raises(LoweringError, match=r"no kernel for op depth_to_space .*spread.*function main"):
        MilModel.open(path).session()


def test_unknown_names(saved: Path) -> None:
    model = MilModel.open(saved)
    with pytest.raises(UsageError, match="no function decode") as caught:
        model.session("decode")
    assert "main" in caught.value.hint


def test_not_a_package(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Manifest\.json cannot be read"):
        MilModel.open(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [("{", "cannot be read"), ("{}", "names no root model"), ("escape", "not in the package")],
)
def test_damaged_manifest(copy: Path, manifest: str, message: str) -> None:
    if manifest == "escape":
        entries = {"a": {"path": "../Manifest.json"}}
        manifest = json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": entries})
    (copy / "Manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match=message):
        MilModel.open(copy)


def test_damaged_model(copy: Path) -> None:
    (copy / MODEL).write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match="is damaged"):
        MilModel.open(copy)


def test_a_neural_network_is_not_an_ml_program(copy: Path) -> None:
    model = coremltools_module("coremltools.proto.Model_pb2").Model()
    model.neuralNetwork.SetInParent()
    (copy / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="type neuralNetwork"):
        MilModel.open(copy)


def test_a_name_that_nothing_defines(copy: Path) -> None:
    proto = coremltools_module("coremltools.proto.Model_pb2")
    model = proto.Model.FromString((copy / MODEL).read_bytes())
    function = model.mlProgram.functions["main"]
    function.block_specializations[function.opset].operations[-1].inputs["x"].arguments[0].name = "ghost"
    (copy / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="op y, output y, function main uses ghost"):
        MilModel.open(copy).session()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-32], "bytes expected"),
        (lambda data: data[:70], "ends before"),
        (lambda data: bytes(len(data)), "no entry starts there"),
        (lambda data: data[:68] + struct.pack("<I", 1) + data[72:], "element type 1, the program declares fp32"),
        (lambda _: b"", "cannot be read"),
    ],
)
def test_damaged_weights(copy: Path, damage: Any, message: str) -> None:
    weights = copy / WEIGHTS
    weights.write_bytes(damage(weights.read_bytes()))
    session = MilModel.open(copy).session()
    with pytest.raises(ArtifactError, match=message):
        session.predict({"x": np.zeros((2, 8))})


def test_a_changed_weight_changes_the_result(copy: Path, saved: Path) -> None:
    """What is run is the file, not something remembered."""
    weights = copy / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(bytes(data))
    x = np.ones((2, 8), np.float32)
    good = MilModel.open(saved).session().predict({"x": x})["y"]
    np.testing.assert_allclose(good, x @ WEIGHT.T, rtol=1e-5, atol=1e-6)
    assert not np.allclose(MilModel.open(copy).session().predict({"x": x})["y"], good)


@pytest.mark.parametrize("kind", ["fp16", "fp32", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int4"])
def test_weight_files_read_as_coremltools_wrote_them(tmp_path: Path, kind: str) -> None:
    storage = coremltools_module("coremltools.libmilstoragepython")
    path = tmp_path / "weight.bin"
    writer = storage._BlobStorageWriter(str(path))
    element = BY_NAME[kind]
    low, high = (-8, 8) if kind.startswith("int") else (0, 16)
    values = RNG.integers(low, high, 37).astype(element.numpy)
    stored = values.view(np.uint16) if kind == "fp16" else values
    writer.write_int8_data(np.arange(5, dtype=np.int8))
    offset = getattr(writer, f"write_{'float' if kind == 'fp32' else kind}_data")(stored)
    np.testing.assert_array_equal(BlobFile(path).read(offset, element, (37,)), values)


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "coremltools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    with pytest.raises(MissingExtraError) as caught:
        coremltools_module("coremltools.proto.Model_pb2")
    assert caught.value.hint == "pip install 'moec[coreml]'"


class NotInstalled:
    def find_spec(self, name: str, *_: object) -> None:
        if name == "coremltools":
            raise ModuleNotFoundError("No module named 'coremltools'", name=name)
