"""Formats by content, and what is said where a file is of none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moec import cli
from moec.compiler.common.errors import ArtifactError, MissingExtraError, UsageError
from moec.compiler.foreign import formats
from moec.compiler.foreign.formats import recognise
from moec.targets.model_files import FileFormat


def test_a_name_says_nothing(foreign_onnx: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(foreign_onnx() / "model.onnx", tmp_path / "model.gguf")
    (tmp_path / "notes.onnx").write_text("no model")
    assert recognise(tmp_path).format == "ONNX"
    assert recognise(tmp_path / "model.gguf").producer == "someone else"


def test_unknown_formats(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a nothing")
    with pytest.raises(UsageError, match="no model of a known format") as caught:
        recognise(tmp_path)
    assert "ONNX: a protobuf with a graph" in caught.value.hint
    with pytest.raises(UsageError, match="no such file"):
        recognise(tmp_path / "missing")


def test_several_models(foreign_onnx: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(foreign_onnx() / "model.onnx", tmp_path / name)
    with pytest.raises(UsageError, match=r"several models: a.onnx, b.onnx"):
        recognise(tmp_path)
    shutil.copy(foreign_onnx() / "model.onnx", tmp_path / "model.onnx")
    assert recognise(tmp_path).path.name == "model.onnx"


def test_a_missing_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"NEW!")
    new = FileFormat(
        "NEW", "NEW!", lambda _, head: head == b"NEW!", lambda path: pytest.fail(str(path)), ("not_there", "new")
    )
    monkeypatch.setattr(formats, "FORMATS", (new,))
    with pytest.raises(MissingExtraError, match="NEW needs not_there") as caught:
        recognise(tmp_path)
    assert caught.value.hint == "pip install 'moec[new]'"
    assert caught.value.exit_code == 8


def test_missing_data(foreign_onnx: Callable[..., Path], tmp_path: Path) -> None:
    import onnx

    model = onnx.load(foreign_onnx() / "model.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert [path.name for path in recognise(tmp_path).files] == ["model.onnx", "weights.bin"]
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match="weights"):
        recognise(tmp_path)


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        (["--bindings", "missing.yaml"], 2, "missing.yaml"),
        (["--latency-baseline", "other"], 2, "has no baseline"),
        (["--latency-budget", "load=2s"], 2, "budgets of decode and prefill"),
        (["-o", "full"], 2, "holds no report"),
    ],
)
def test_refusals(
    foreign_onnx: Callable[..., Path],
    tiny_checkpoint: Callable[[str], Path],
    extra: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    checkpoint = str(tiny_checkpoint("olmoe"))
    assert cli.dispatch(["validate", str(foreign_onnx()), "--against", checkpoint, *extra]) == code
    assert said in capsys.readouterr().err


def test_another_checkpoint(
    foreign_onnx: Callable[..., Path], tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.dispatch(["validate", str(foreign_onnx()), "--against", str(tiny_checkpoint("gpt_oss"))]) == 10
    assert "give the checkpoint that the file was made from" in capsys.readouterr().err
