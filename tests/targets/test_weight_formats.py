"""A format of weights that a target does not know is refused: never stored as something else in silence."""

from pathlib import Path
from typing import Any

import pytest

from moec import cli, passes
from moec.compiler.capture import capture
from moec.compiler.checkpoint import Checkpoint
from moec.passes.quantize import Quantize
from moec.quantize.plan import requested
from moec.targets import get_target


@pytest.mark.parametrize("name", ["onnx", "tflite", "tensorrt", "coreml"])
def test_only_coreml_takes_palettes(name: str, tiny_checkpoint: Any) -> None:
    program, _ = passes.run_passes(capture(Checkpoint.open(tiny_checkpoint("olmoe"))), passes.default_passes())
    palettes = Quantize(requested("palettize4")).run(program).program
    target = get_target(name)
    refused = [item for item in target.refusals(palettes, target.Options()) if "palettize4" in item.reason]
    assert bool(refused) == (name != "coreml")
    for item in refused:
        assert item.source == name
        assert item.where in palettes.weights
        assert "weights may be int4, int8" in item.reason


@pytest.mark.parametrize("name", ["onnx", "tflite", "tensorrt"])
def test_the_refusal_is_exit_code_4_and_names_a_tensor(
    name: str, tiny_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["-t", name, "--quantize", "palettize4", "--no-gates", "-q", "-o", str(out)]
    assert cli.dispatch(["export", str(tiny_checkpoint("olmoe")), *flags]) == 4
    message = capsys.readouterr().err
    assert "self_attn" in message
    assert "palettize4" in message
    assert not out.exists()
