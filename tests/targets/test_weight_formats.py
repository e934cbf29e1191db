"""Formats of weights: what `auto` may choose has a form, and what a target does not know is refused.

Nothing is ever stored as something else in silence.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import cli, passes
from moec.compiler.common.validation import validate
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.integrity import expert_weights, other_weights
from moec.compiler.ir.program import Program
from moec.compiler.pipeline.recorded_codes import read_in_format
from moec.passes.quantize import Quantize
from moec.quantize.formats import IntegerFormat, TableFormat, parse_format, parse_supported
from moec.quantize.keep import SupportedFormats
from moec.quantize.lazy import Quantized
from moec.quantize.plan import ALWAYS_FLOAT, QuantizationPlan, TensorClass, requested
from moec.quantize.recorded import sha256_of
from moec.targets import get_target
from moec.targets.base import Target, TargetOptions
from moec.targets.stored_weights import StoredWeight


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
    """A model of one layer whose dimensions every block divides."""
    directory = tmp_path_factory.mktemp("wide")
    tiny_model("olmoe", hidden_size=128, intermediate_size=128, num_hidden_layers=1).save_pretrained(directory)

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
def test_a_target_has_a_form_for_all_that_it_offers(
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
    offered = {member: _offered(target, chosen, member, dtype) for member in classes}
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
        assert_read_back(quantized, target.stored_weights(directory))


def _offered(target: Target, options: TargetOptions, tensor_class: str, dtype: torch.dtype) -> list[str]:
    """What `auto` may choose, and what else `keep` may leave as it is and a plan can name."""
    kept = target.kept_formats(options, tensor_class, "fp16" if dtype is torch.float16 else "fp32")
    formats = {_grid(form): form for form in (*kept, *target.auto_formats(options, tensor_class))}
    return [form for grid, form in formats.items() if not grid.startswith("table")]


def _grid(form: str) -> str:
    found = parse_supported(form)
    assert isinstance(found, IntegerFormat | TableFormat)
    return found.grid


BLOCKS = {"int4:32", "int8:32"}
ROWS = {"int4:channel", "int8:channel"}
POINTS = {"int4:32:asym", "int4:channel:asym"}
TABLE = {"table4:32"}
HELD: dict[str, tuple[set[str], set[str]]] = {
    # Grids of experts with scales of half precision that a target holds by default, and of single precision.
    "onnx": (BLOCKS | ROWS | POINTS, BLOCKS | ROWS | POINTS),
    "tensorrt": (BLOCKS, BLOCKS),
    "coreml": (BLOCKS | ROWS | POINTS | TABLE, set()),
    "tflite": ({"int4:32", "int4:channel"}, {"int4:channel"}),
}


@pytest.mark.parametrize("name", HELD)
def test_codes_that_a_target_passes_on(name: str) -> None:
    target, grids = get_target(name), BLOCKS | ROWS | POINTS | TABLE
    held = SupportedFormats(functools.partial(target.kept_formats, target.Options(), dtype=target.default_dtype))
    found = [{grid for grid in grids if _kept(held, grid + scales)} for scales in ("", ":fp32")]
    assert found == list(HELD[name])


def _kept(held: SupportedFormats, form: str) -> bool:
    found = parse_supported(form)
    assert isinstance(found, IntegerFormat | TableFormat)
    return held.kept("experts_down", found) is not None


def assert_read_back(program: Program, stored: Mapping[str, StoredWeight]) -> None:
    """Every weight with codes is read back as these very codes, and experts and embeddings as they are."""
    names = expert_weights(program) | other_weights(program, stored.keys())
    assert stored.keys() == names.keys()
    for name, weight in stored.items():
        own = program.weights[name]
        if not isinstance(own, Quantized):
            np.testing.assert_array_equal(weight.values(1, 3), own.rows(1, 3).to(names[name]).float().numpy())
            continue
        assert weight.bits == own.format.bits or weight.bits == 8
        for start, stop in ((0, own.shape[0]), (2, 5)):
            want, found = own.quantized_rows(start, stop), read_in_format(name, weight, start, stop, own.format)
            assert sha256_of([found]) == sha256_of([want])
            assert torch.equal(found.codes, want.codes)
            assert torch.equal(found.scales, want.scales)
            np.testing.assert_array_equal(weight.values(start, stop), want.dequantize().numpy())
