"""Formats of weights: what `auto` may choose has a form, and what a target does not know is refused.

Nothing is ever stored as something else in silence.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moec import cli, passes
from moec.compiler.common.validation import validate
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.passes.quantize import Quantize
from moec.quantize.formats import parse_format
from moec.quantize.plan import ALWAYS_FLOAT, QuantizationPlan, TensorClass, requested
from moec.targets import get_target


@pytest.mark.parametrize("name", ["onnx", "tflite", "tensorrt", "coreml"])
def test_only_coreml_takes_palettes(name: str, program_of: Any) -> None:
    palettes = Quantize(requested("palettize4")).run(program_of("olmoe")).program
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


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Program]:
    """A model whose dimensions every block divides."""
    directory = tmp_path_factory.mktemp("wide")
    tiny_model("olmoe", hidden_size=128, intermediate_size=128).save_pretrained(directory)

    @functools.cache
    def program(dtype: torch.dtype) -> Program:
        return passes.run_passes(capture(Checkpoint.open(directory), dtype=dtype), passes.default_passes())[0]

    return program


@pytest.mark.parametrize(
    ("name", "options", "dtype", "zero_points"),
    [
        ("onnx", {}, torch.float32, True),
        ("onnx", {"flavor": "genai"}, torch.float32, True),
        ("onnx", {"flavor": "portable"}, torch.float32, False),
        ("tflite", {"prefill": (4,), "context": 8}, torch.float32, False),
        ("tflite", {"prefill": (4,), "context": 8, "runtime": "tflite-runtime"}, torch.float32, False),
        ("tensorrt", {"engine": False}, torch.float32, False),
        ("coreml", {"context": 8}, torch.float16, True),
    ],
)
def test_a_target_has_a_form_for_all_that_auto_may_choose(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    zero_points: bool,
    wide: Callable[[torch.dtype], Program],
    tmp_path: Path,
) -> None:
    program = wide(dtype)
    target = get_target(name)
    chosen = validate(target.Options, options, where=name)
    classes = [member for member in TensorClass if member not in ALWAYS_FLOAT]
    offered = {member: target.auto_formats(chosen, member) for member in classes}
    assert any("asym" in form for forms in offered.values() for form in forms) == zero_points
    for index in range(max(map(len, offered.values()))):
        # A class with fewer formats has its last one again.
        formats = {
            member: parse_format(forms[min(index, len(forms) - 1)]) for member, forms in offered.items() if forms
        }
        later = (Quantize(QuantizationPlan.build(formats)), *target.passes(chosen))
        quantized, _ = passes.run_passes(program, later, completed=[item.name for item in passes.default_passes()])
        assert not target.refusals(quantized, chosen)
        directory = tmp_path / str(index)
        directory.mkdir()
        target.lower(quantized, chosen, directory, lambda *_: None)
