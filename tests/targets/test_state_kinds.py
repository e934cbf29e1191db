"""A kind of state that a target does not carry is refused before anything is written."""

from pathlib import Path
from typing import Any

import pytest

from moec import cli, passes
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.targets import get_target


@pytest.fixture(scope="module")
def hybrid(tiny_checkpoint: Any) -> Any:
    captured = capture(Checkpoint.open(tiny_checkpoint("lfm2_moe")))
    return passes.run_passes(captured, passes.default_passes())[0]


@pytest.mark.parametrize("name", ["onnx", "tflite", "tensorrt", "coreml"])
def test_who_carries_convolution_states(name: str, hybrid: Any) -> None:
    target = get_target(name)
    refused = target.refusals(hybrid, target.Options())
    assert bool(refused) == (name in {"tflite", "coreml"})
    for item in refused:
        assert (item.source, item.where) == (name, "layer 0 and 1 more")
        assert item.reason == "a state of kind conv has no form here; layers may keep states of the kinds key, value"


@pytest.mark.parametrize("flags", [["tflite"], ["coreml"], ["coreml", "--flavor", "swift-transformers"]])
def test_the_refusal_is_exit_code_4(
    flags: list[str], tiny_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(tiny_checkpoint("lfm2_moe")), "--no-gates", "-q", "-o", str(out), "-t", *flags]
    assert cli.dispatch(arguments) == 4
    assert "layer 0 and 1 more: a state of kind conv" in capsys.readouterr().err
    assert not out.exists()
