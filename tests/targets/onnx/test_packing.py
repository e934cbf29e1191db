"""Packed weights give the bits of the artifact, in moec's runner and in plain ONNX Runtime."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import moec
from moec import cli
from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.files import partial_prefix
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.run import packed_cache, packing
from moec.targets.onnx import packing as onnx_packing
from moec.targets.onnx import runner as onnx_runner
from moec.targets.onnx.runner import OnnxRunner
from moec.targets.onnx.target import OnnxTarget

IDS = np.random.default_rng(0).integers(3, 128, (2, 40))
Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    tiny_model("qwen2_moe", intermediate_size=96, moe_intermediate_size=32).save_pretrained(checkpoint)

    def export(form: str, flavor: str = "default") -> Path:
        directory = tmp_path_factory.mktemp("exported") / "out"
        quantize = {"format": form, "rounding": "rtn"}
        moec.export(
            checkpoint, target="onnx", output=directory, gates=False, quantize=quantize, options={"flavor": flavor}
        )
        return directory

    return export


def steps(runner: OnnxRunner) -> list[np.ndarray]:
    padded = np.ones(IDS.shape, np.int64)
    padded[0, :7] = 0
    found = [runner.prefill(IDS[:, :-2]), runner.decode(IDS[:, -2:-1]), runner.decode(IDS[:, -1:])]
    return [*found, runner.prefill(IDS, padded), runner.prefill(IDS[:1, :1])]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("form", "flavor"),
    [("int4", "default"), ("int8", "default"), ("int4", "genai"), ("int4", "web"), ("none", "default")],
)
def test_the_bits_are_those_of_the_artifact(
    form: str, flavor: str, threads: int, exported: Exported, tmp_path: Path
) -> None:
    directory = exported(form, flavor)
    packing.pack_into(directory, tmp_path / "packed", lambda *_: None)
    plain, packed = (steps(OnnxRunner(path, threads=threads)) for path in (directory, tmp_path / "packed"))
    assert read_manifest(tmp_path / "packed")["files"].keys() >= read_manifest(directory)["files"].keys()
    for want, found in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(found, want)


def test_the_file_holds_what_the_kernels_pack(exported: Exported, tmp_path: Path) -> None:
    """The graph says so, too: a constant has packed blobs beside it."""
    directory = exported("int4")
    packing.pack_into(directory, tmp_path / "packed", lambda *_: None)
    model = onnx.load(tmp_path / "packed" / "model.onnx", load_external_data=False)
    keys = {item.key for tensor in model.graph.initializer for item in tensor.external_data}
    assert any(key.startswith("prepacked") for key in keys)
    sizes = [(path / "model.onnx_data").stat().st_size for path in (directory, tmp_path / "packed")]
    assert sizes[1] > 1.3 * sizes[0]


def test_scales_of_experts_are_stored_as_the_kernel_computes_with_them(exported: Exported, tmp_path: Path) -> None:
    """In float32: ONNX Runtime would convert scales in half precision into private memory."""
    directory = exported("int4")
    packing.pack_into(directory, tmp_path / "packed", lambda *_: None)
    found = []
    for path in (directory, tmp_path / "packed"):
        model = onnx.load(path / "model.onnx", load_external_data=False)
        (kernel, *_) = [node for node in model.graph.node if node.op_type == "QMoE"]
        constants = {item.name: item for item in model.graph.initializer}
        scales = [constants[kernel.input[index]] for index in (3, 6)]
        found.append([onnx.numpy_helper.to_array(item, base_dir=str(path)) for item in scales])
    for given, stored in zip(*found, strict=True):
        assert (given.dtype, stored.dtype) == (np.float16, np.float32)
        np.testing.assert_array_equal(stored, given.astype(np.float32))


def test_memory_is_reused_while_packed_weights_are_opened(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused: list[bool] = []

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        reused.append(True)
        yield

    directory = exported("int4")
    packing.pack_into(directory, tmp_path / "packed", lambda *_: None)
    monkeypatch.setattr(onnx_runner, "reusing_freed_memory", noted)
    OnnxRunner(directory)
    assert not reused, "its weights are converted once, into memory that stays"
    OnnxRunner(tmp_path / "packed")
    assert reused


def test_weights_are_packed_in_groups(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = exported("int4")
    sessions: list[int] = []
    real = ort.InferenceSession

    def counted(*arguments: Any, **settings: Any) -> ort.InferenceSession:
        sessions.append(1)
        return real(*arguments, **settings)

    def packed(name: str, together: int) -> dict[str, list[str]]:
        monkeypatch.setattr(onnx_packing, "TOGETHER", together)
        sessions.clear()
        (tmp_path / name).mkdir()
        onnx_packing.write_packed(directory, tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["model.onnx", "model.onnx_data"]
        model = onnx.load(tmp_path / name / "model.onnx", load_external_data=False)
        entries = {item.name: {e.key: e.value for e in item.external_data} for item in model.graph.initializer}
        found = {key: own["prepacked_0"].split("|") for key, own in entries.items() if "prepacked_0" in own}
        offsets = [int(blob.split(";")[0]) for _, *blobs in found.values() for blob in blobs]
        assert not any(offset % 4096 for offset in offsets), "it cannot be mapped"
        return {key: [digest, *(blob.split(";")[1] for blob in blobs)] for key, (digest, *blobs) in found.items()}

    monkeypatch.setattr(ort, "InferenceSession", counted)
    together = packed("together", 1 << 30)
    assert len(sessions) == 1
    apart = packed("apart", 1)
    assert len(sessions) > 4
    assert apart == together
    assert len(apart) > 4
    for want, found in zip(
        steps(OnnxRunner(tmp_path / "together")), steps(OnnxRunner(tmp_path / "apart")), strict=True
    ):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("form", ["int4", "none"])
def test_gates_open_a_large_artifact_packed_and_leave_nothing(
    form: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "out"
    shutil.copytree(exported(form), directory)
    made: list[Path] = []
    real = onnx_packing.write_packed

    def noted(artifact: Path, output: Path) -> None:
        made.append(output)
        real(artifact, output)

    monkeypatch.setattr(onnx_packing, "write_packed", noted)
    target = OnnxTarget()
    target.open_reference(directory)
    assert not made, "it is small"
    monkeypatch.setattr(onnx_packing, "LARGE", 1)
    runner = target.open_reference(directory)
    assert made[0].name.startswith(partial_prefix(directory)), "the next export would not remove it"
    assert list(tmp_path.iterdir()) == [directory]
    for want, found in zip(steps(OnnxRunner(directory)), steps(runner), strict=True):
        np.testing.assert_array_equal(found, want)


def test_gates_open_an_artifact_as_it_is_where_there_is_no_room(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = exported("int4")
    monkeypatch.setattr(onnx_packing, "LARGE", 1)
    packs: list[Path] = []

    def full(_artifact: Path, output: Path) -> None:
        packs.append(output)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_packing, "write_packed", full)
    want = steps(OnnxRunner(directory))
    for found, expected in zip(steps(OnnxTarget().open_reference(directory)), want, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(packs) == 1
    monkeypatch.setattr(onnx_packing, "COPIES", 1e15)
    OnnxTarget().open_reference(directory)
    assert len(packs) == 1, "it was tried without room"


def test_plain_onnx_runtime_opens_it(exported: Exported, tmp_path: Path) -> None:
    directory = exported("int4")
    packing.pack_into(directory, tmp_path / "packed", lambda *_: None)
    session = ort.InferenceSession(str(tmp_path / "packed" / "model.onnx"), providers=["CPUExecutionProvider"])
    plain = ort.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(spec.name, spec.type) for spec in session.get_inputs()] == [
        (spec.name, spec.type) for spec in plain.get_inputs()
    ]
    assert session.get_modelmeta().custom_metadata_map == plain.get_modelmeta().custom_metadata_map


def test_packing_names_runtime_and_processor() -> None:
    found = OnnxTarget().packing()
    assert found.runtime == f"onnxruntime {ort.__version__}"
    assert found.cpu
    assert found.instruction_set


def test_the_commands(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """pack, inspect, and a copy elsewhere, all by the command line."""
    monkeypatch.setattr(packed_cache.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    directory = exported("int4")

    def said(*arguments: str) -> dict[str, Any]:
        assert cli.dispatch([*arguments, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert said("inspect", str(directory))["packed"] is None
    made = said("pack", str(directory))
    assert Path(made["directory"]).is_relative_to(tmp_path / "cache")
    assert made["source"] == read_manifest(directory)["digest"]
    assert said("inspect", str(directory))["packed"] == {key: made[key] for key in made if key != "ok"}
    assert cli.dispatch(["inspect", str(directory)]) == 0
    assert f"onnxruntime {ort.__version__}" in capsys.readouterr().out
    copied = said("pack", str(directory), "-o", str(tmp_path / "copy"))
    assert copied["directory"] == str(tmp_path / "copy")
    assert said("verify", str(tmp_path / "copy"))["ok"]
    assert said("inspect", str(tmp_path / "copy"))["packed"]["source"] == made["source"]
    assert moec.load(directory).runner.facts() == moec.load(tmp_path / "copy").runner.facts()


def test_a_large_artifact_is_packed_at_its_first_run_unless_told_not_to(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    directory = exported("int4")
    moec.load(directory)
    assert not (tmp_path / "cache").exists(), "it is small"
    monkeypatch.setattr(packing, "WORTHWHILE", 0)
    moec.load(directory, pack=False)
    assert not (tmp_path / "cache").exists()
    assert moec.load(directory).note == ""
    assert list((tmp_path / "cache" / "packed").glob("*/model.onnx"))
