"""Each stored format against the library that defines it, on tensors that the library made (`make_fixtures.py`)."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moec.compiler.common.errors import CheckpointError, UnsupportedModelError
from moec.compiler.frontend.stored import FORMATS, float_tensors
from moec.compiler.ir.encoded_weights import Encoded
from moec.compiler.ir.safetensors_file import WeightFile
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.keep import grid_of, kept
from tests.support.environments import environment, lines

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.safetensors"))


def opened(path: Path) -> tuple[LazyTensor, torch.Tensor]:
    """The float weight as moec reads it, and as the library does."""
    with safe_open(path, framework="pt") as file:
        expected = file.get_tensor("expected")
        settings = json.loads(file.metadata()["quantization_config"])
    entries = {entry.name: entry for entry in WeightFile(path).entries() if entry.name != "expected"}
    tensors = float_tensors(entries, settings, path)
    assert set(tensors) == {"layer.weight"}, "every tensor of the quantized weight belongs to it"
    return tensors["layer.weight"], expected


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_values_are_those_of_the_library(path: Path) -> None:
    weight, expected = opened(path)
    assert weight.shape == tuple(expected.shape)
    value = weight.read()
    assert value.dtype == weight.dtype
    # Equal in half precision; in float32 bitsandbytes divides by 127 in another order.
    torch.testing.assert_close(value.to(expected.dtype), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_rows_are_rows_of_the_whole(path: Path) -> None:
    weight, _ = opened(path)
    whole = weight.read()
    for start, stop in ((0, 1), (3, 17), (weight.shape[0] - 5, weight.shape[0]), (7, 7)):
        assert torch.equal(weight.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_codes_make_the_values(path: Path) -> None:
    weight, _ = opened(path)
    assert isinstance(weight, Encoded)
    codes, scales = weight.codes.read().float(), weight.scales.read().float()
    zeros = 0 if weight.zeros is None else weight.zeros.read().float()
    assert torch.equal(((codes - zeros) * scales).to(weight.dtype), weight.read())
    if weight.whole:
        half = 1 << (weight.bits - 1)
        assert float(codes.min()) >= -half
        assert float(codes.max()) < half


GRIDS = {
    "awq": "int4:32:asym",
    "gptq-4-asym-act-order": "int4:32:asym",
    "gptq-4-sym": "int4:32",
    "gptq-v2-4-asym": "int4:32:asym",
    "int8-channel": "int8:channel",
    "llm-int8": "int8:channel:fp32",
    "mxfp4-packed": "table4:32",
    "naive-int8-group": "int8:32",
    "nvfp4-packed": "table4:16:fp32",
    "pack-int4-group": "int4:32",
    "pack-int4-group-asym": "int4:32:asym",
    "pack-int8-channel": "int8:channel",
}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_codes_that_can_be_kept_are_the_weight(path: Path) -> None:
    weight, _ = opened(path)
    grid = grid_of(weight)
    assert grid is not None
    assert (None if grid.format is None else str(grid.format)) == GRIDS.get(path.stem)
    for fmt, rounded in grid.forms():
        found = kept("layer.weight", weight, fmt, exact=not rounded)
        values, stored = torch.cat([found.rows(0, 5), found.rows(5, weight.shape[0])]), weight.read().float()
        torch.testing.assert_close(values, stored, rtol=2.0**-11 if rounded else 0, atol=0)
        assert all(error < 2.0**-22 for error in found.errors())


def test_every_format_has_a_fixture() -> None:
    made = set()
    for path in FIXTURES:
        with safe_open(path, framework="pt") as file:
            made.add(json.loads(file.metadata()["quantization_config"])["quant_method"])
    # Those two are checked against transformers itself; fbgemm_fp8 is compressed-tensors under another name.
    assert made | {"mxfp4", "fp8", "fbgemm_fp8"} == set(FORMATS)


@pytest.mark.parametrize("left_out", ["qzeros", "scales"])
def test_a_missing_part_is_named(left_out: str) -> None:
    path = next(path for path in FIXTURES if path.stem == "gptq-4-sym")
    entries = {entry.name: entry for entry in WeightFile(path).entries() if not entry.name.endswith(left_out)}
    with pytest.raises(CheckpointError, match=rf"layer\.{left_out} is missing from the files"):
        float_tensors(entries, {"quant_method": "gptq"}, path)


def test_parts_of_another_weight_are_refused() -> None:
    named = {path.stem: path for path in FIXTURES}
    four, eight = (
        {entry.name: entry for entry in WeightFile(named[name]).entries()} for name in ("gptq-4-sym", "gptq-8-asym")
    )
    with pytest.raises(CheckpointError, match=r"layer\.g_idx does not fit the other tensors"):
        float_tensors({**four, "layer.qweight": eight["layer.qweight"]}, {"quant_method": "gptq"}, Path("checkpoint"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "hqq"}, "hqq.*moec reads awq, bitsandbytes"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq or gptq_v2, not 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ({"bits": 4}, "no quant_method"),
    ],
)
def test_what_is_not_read_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as refused:
        float_tensors({}, settings, Path("checkpoint"))
    assert refused.value.exit_code == 3
    assert refused.value.hint


@pytest.mark.interop
def test_the_libraries_still_make_the_fixtures(tmp_path: Path) -> None:
    """They run beside the torch that is installed here; gptqmodel is read from its source, as its build needs CUDA."""
    packages = lines(Path(__file__).with_name("quantizers-requirements.txt"))
    python = environment("quantizers", packages, beside=True, alone=True, sources=["gptqmodel==7.7.0"])
    script = Path(__file__).with_name("make_fixtures.py")
    subprocess.run([python, str(script), str(tmp_path)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for path in FIXTURES:
        with safe_open(path, framework="pt") as old, safe_open(tmp_path / path.name, framework="pt") as new:
            assert set(old.keys()) == set(new.keys())
            for name in old.keys():  # noqa: SIM118 - no mapping
                assert torch.equal(old.get_tensor(name).to(torch.float64), new.get_tensor(name).to(torch.float64)), name
