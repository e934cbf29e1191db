"""Rounding of activations as kernels do it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moec.compiler.ir.weights import Constant
from moec.quantize.activations import round_blocks_to_int8, round_rows_to_int8
from moec.quantize.formats import IntegerFormat, parse_format
from moec.quantize.lazy import Quantized, quantized


def weight(text: str) -> Quantized:
    form = parse_format(text)
    assert isinstance(form, IntegerFormat)
    return quantized("w", Constant(torch.ones(3, 32)), form)


def by_definition(row: list[float]) -> list[float]:
    """One row, in exact numbers."""
    exact = [Fraction(value) for value in row]
    low, high = min(*exact, Fraction(0)), max(*exact, Fraction(0))
    scale = (high - low) / 255 or Fraction(1)
    zero = min(max(round(-128 - low / scale), -128), 127)
    codes = [min(max(round(value / scale) + zero, -128), 127) for value in exact]
    return [float((code - zero) * scale) for code in codes]


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0, 40.0])
def test_rows_are_rounded_by_their_extremes(shift: float) -> None:
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) + shift
    got = round_rows_to_int8(weight("int8:channel:int8-dynamic"), rows)
    want = torch.tensor([by_definition(row) for row in rows.tolist()])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * float(rows.abs().max()))
    assert 0 < float((got - rows).abs().max()) <= 1.01 * float(rows.amax() - min(0.0, float(rows.amin()))) / 255


def test_a_row_of_zeros_stays() -> None:
    rows = torch.zeros(2, 32)
    assert torch.equal(round_rows_to_int8(weight("int4:32:int8-dynamic"), rows), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    rows = torch.linspace(-1, 1, 32).to(dtype)[None]
    assert round_rows_to_int8(weight("int8:channel:int8-dynamic"), rows).dtype == dtype


@pytest.mark.parametrize("of", [Constant(torch.ones(3, 32)), weight("int4:32"), weight("int8:channel")])
def test_a_weight_that_takes_floats_rounds_nothing(of: Constant | Quantized) -> None:
    rows: Tensor = torch.randn(2, 32)
    assert round_rows_to_int8(of, rows) is rows


def test_blocks_are_rounded_by_their_largest_value() -> None:
    """The last block is shorter, and a block of zeros stays."""
    rows = torch.randn(3, 80, generator=torch.Generator().manual_seed(1))
    rows[1, 32:64] = 0
    got = round_blocks_to_int8(rows, 32)
    for row, found in zip(rows.double().tolist(), got.tolist(), strict=True):
        for start in range(0, 80, 32):
            block = row[start : start + 32]
            scale = max(map(abs, block)) / 127 or 1.0
            assert found[start : start + 32] == pytest.approx([round(value / scale) * scale for value in block], 1e-5)
    assert float((got - rows).abs().max()) > 1e-3
    assert round_blocks_to_int8(rows.half(), 32).dtype == torch.float16
