"""Which target carries which kind of state; what one does not carry is refused before anything is written."""

from pathlib import Path
from typing import Any

import pytest

from moec import cli
from moec.targets import get_target
from moec.targets.tflite.target import TfliteTarget

NAMES = ["onnx", "tflite", "tensorrt", "coreml"]


@pytest.fixture(scope="module")
def hybrid(program_of: Any) -> Any:
    return program_of("lfm2_moe")


@pytest.mark.parametrize("name", NAMES)
def test_every_target_carries_convolution_states(name: str, hybrid: Any) -> None:
    target = get_target(name)
    assert target.refusals(hybrid, target.Options()) == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_that_a_target_does_not_name(name: str, hybrid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = get_target(name)
    monkeypatch.setattr(type(target), "state_kinds", frozenset({"key", "value"}))
    (refused,) = target.refusals(hybrid, target.Options())
    assert (refused.source, refused.where) == (name, "layer 0 and 1 more")
    assert (
        refused.reason == "a state of kind conv is not supported here; layers may keep states of the kinds key, value"
    )


def export(checkpoint: Path, out: Path, *flags: str) -> int:
    return cli.dispatch(["export", str(checkpoint), "--no-gates", "-q", "-o", str(out), "-t", *flags])


def test_the_refusal_is_exit_code_4(
    tiny_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TfliteTarget, "state_kinds", frozenset({"key", "value"}))
    assert export(tiny_checkpoint("lfm2_moe"), tmp_path / "out", "tflite") == 4
    assert "layer 0 and 1 more: a state of kind conv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["coreml", "--flavor", "swift-transformers"],
            "layer 0: its state of kind conv is not a KV cache: swift-transformers supports only keyCache",
        ),
        (["tflite", "--bundle"], "layer 0: LiteRT-LM (--bundle) supports only KV caches, not states of kind conv"),
    ],
)
def test_forms_for_libraries_that_keep_caches_alone(
    flags: list[str], reason: str, tiny_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(tiny_checkpoint("lfm2_moe"), out, *flags) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert reason in said
    assert not out.exists()
