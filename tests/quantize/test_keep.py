"""Codes of a checkpoint on the grids that targets hold: what is exact, what is rounded, and what is said of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moec.compiler.ir.encoded_weights import Encoded, PerBlock
from moec.compiler.ir.weights import Concatenated, Constant
from moec.quantize.formats import IntegerFormat, TableFormat, parse_supported
from moec.quantize.keep import ROUNDED_SCALES, KeptFormat, SupportedFormats, grid_of, kept

TABLE = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
EXACT, NEAR, TINY = 0.25, 0.1, 2.0**-40


def weight(scale: float, *, table: Tensor | None = None) -> Encoded:
    """[4, 64] with a scale for each 32 columns."""
    numbers = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = numbers.to(torch.int8) - 8 if table is None else table[numbers.long()]
    spread = PerBlock(Constant(torch.full((4, 2), scale)), (4, 64), (1, 32))
    indices = None if table is None else Constant(numbers)
    return Encoded("test", 4, table is None, Constant(codes), spread, indices=indices, table=table)


def form(scale: float, **more: Any) -> KeptFormat | None:
    grid = grid_of(weight(scale, **more))
    assert grid is not None
    return grid.format


def test_a_grid_has_scales_of_the_least_precision_that_holds_them() -> None:
    assert str(form(EXACT)) == "int4:32"
    assert str(form(NEAR)) == "int4:32:fp32"
    assert str(form(EXACT, table=TABLE)) == "table4:32"
    assert str(form(TINY, table=TABLE)) == "table4:32:fp32"


@pytest.mark.parametrize("table", [None, TABLE])
@pytest.mark.parametrize(
    ("scale", "held", "expected"),
    [
        (EXACT, "", ("", "")),
        (EXACT, ":fp32", ("", "")),
        (NEAR, ":fp32", (":fp32", "")),
        (NEAR, "", ("", ROUNDED_SCALES)),
        (TINY, ":fp32", (":fp32", "")),
        (TINY, "", None),
    ],
)
def test_a_target_takes_scales_that_it_stores_as_they_are_and_rounds_others_if_that_is_little(
    scale: float, held: str, expected: tuple[str, str] | None, table: Tensor | None
) -> None:
    tensor, text = weight(scale, table=table), "int4:32" if table is None else "table4:32"
    grid, target = grid_of(tensor), SupportedFormats(lambda _: (text + held, "int8:64"))
    assert grid is not None
    found = [(fmt, said) for fmt, said in grid.forms() if target.kept("attention", fmt) is not None]
    assert [(str(fmt), said) for fmt, said in found[:1]] == ([(text + expected[0], expected[1])] if expected else [])
    if not expected:
        return
    (fmt, said) = found[0]
    taken = kept("w", tensor, fmt, exact=not said)
    values, exact = torch.cat([taken.rows(0, 1), taken.rows(1, 4)]), tensor.rows(0, 4)
    assert torch.equal(values, exact) == (said == "")
    assert all(0 < error < 1e-6 for error in taken.errors()) if said else taken.errors() == [0.0]
    torch.testing.assert_close(values, exact, rtol=2.0**-11, atol=0.0)


def test_weights_of_two_tables_have_no_common_grid() -> None:
    one, other = weight(EXACT, table=TABLE), weight(EXACT, table=TABLE.roll(1))
    assert grid_of(Concatenated((one, one), 0)).format == TableFormat(32)  # type: ignore[union-attr]
    grid = grid_of(Concatenated((one, other), 0))
    assert grid is not None
    assert grid.format is None
    assert "indices into one lookup table" in grid.reason


def test_a_table_that_half_precision_does_not_hold_is_no_grid() -> None:
    nf4 = torch.linspace(-1, 1, 16)
    assert form(EXACT, table=nf4) is None
    assert form(EXACT, table=nf4.half().float()) == TableFormat(32)


def test_text_forms_of_what_targets_hold() -> None:
    for text in ("table4:32", "table4:16:fp32", "int4:32:asym"):
        assert str(parse_supported(text)) == text
    assert isinstance(parse_supported("int8:channel"), IntegerFormat)
    # A code and its share of a scale, and the table.
    assert TableFormat(32).planned_bytes((2, 4, 64)) == 2 * (4 * (32 + 2 * 2) + 32)
