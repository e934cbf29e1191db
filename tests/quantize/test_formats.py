import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.common.errors import UsageError
from moec.quantize.formats import (
    BLOCK_SIZES,
    FP16,
    NONE,
    Activations,
    FloatFormat,
    FloatKind,
    Format,
    IntegerFormat,
    PaletteFormat,
    ScaleType,
    default_block,
    parse_format,
)

INTEGER_FORMATS = st.builds(
    IntegerFormat,
    bits=st.just(4),
    granularity=st.sampled_from(["auto", "auto32", "channel", 32, 64, 128]),
    symmetric=st.booleans(),
    scale_type=st.sampled_from(ScaleType),
    activations=st.sampled_from(Activations),
) | st.builds(
    IntegerFormat,
    bits=st.just(8),
    granularity=st.sampled_from(["auto", "auto32", "channel", 32, 64, 128]),
    scale_type=st.sampled_from(ScaleType),
    activations=st.sampled_from(Activations),
)
PALETTE_FORMATS = st.builds(PaletteFormat, rows=st.just("auto") | st.integers(1, 4096))
FORMATS = INTEGER_FORMATS | PALETTE_FORMATS | st.builds(FloatFormat, st.sampled_from(FloatKind))


@given(FORMATS)
@settings(deadline=None)
def test_text_form_round_trips(chosen: Format) -> None:
    assert parse_format(str(chosen)) == chosen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", NONE),
        ("fp16", FP16),
        (" INT8 ", IntegerFormat(8)),
        ("int4:32:sym", IntegerFormat(4, 32)),
        ("int4:asym:64", IntegerFormat(4, 64, symmetric=False)),
        ("int8:channel:fp32", IntegerFormat(8, "channel", scale_type=ScaleType.FP32)),
        ("palettize4", PaletteFormat()),
        ("palettize4:auto", PaletteFormat()),
        ("palettize4:8", PaletteFormat(rows=8)),
        ("int8:int8-dynamic", IntegerFormat(8, activations=Activations.INT8_DYNAMIC)),
    ],
)
def test_text_forms(text: str, expected: Format) -> None:
    assert parse_format(text) == expected


def test_the_defaults_are_not_printed() -> None:
    assert str(parse_format("int4:auto:sym:fp16:float")) == "int4"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("int5", "unknown format 'int5'", "did you mean 'int8'"),
        ("", "unknown format ''", "the formats: fp16, int4, int8, none, palettize4"),
        ("int4:33", "unknown word '33'", "did you mean '32'"),
        ("int4:chanel", "unknown word 'chanel'", "did you mean 'channel'"),
        ("int4:32:64", "'64' contradicts", "keep one"),
        ("int4:sym:asym", "'asym' contradicts", "keep one"),
        ("fp16:32", "takes no further words", "write fp16"),
        ("palettize4:8:16", "at most a number of rows", "palettize4:8"),
        ("palettize4:fp16", "at most a number of rows", "palettize4:8"),
        ("palettize4:0", "0 rows cannot share a palette", "palettize4:8"),
        ("int8:asym", "int8:asym does not exist", "int4:asym"),
    ],
)
def test_what_is_no_format_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_format(text)
    assert message in caught.value.message
    assert hint in caught.value.hint


@given(st.integers(1, 10_000))
@settings(deadline=None)
def test_default_block_is_the_largest_that_divides(dimension: int) -> None:
    fitting = [size for size in BLOCK_SIZES if dimension % size == 0]
    assert default_block(dimension) == (max(fitting) if fitting else "channel")


def test_a_block_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(UsageError, match=r"layers.0.up: block size 128 .* dimension 96") as caught:
        IntegerFormat(4, 128).resolve(96, "layers.0.up")
    assert caught.value.hint == "use block size 32"
    with pytest.raises(UsageError) as caught:
        IntegerFormat(4, 32).resolve(100, "layers.0.up")
    assert "int8:channel" in caught.value.hint


def test_bytes() -> None:
    assert IntegerFormat(4, 32).planned_bytes((1, 256)) == 256 * 4.5 / 8
    assert IntegerFormat(8, 128).planned_bytes((1, 256)) == 256 * 8.125 / 8
    assert IntegerFormat(8, "channel", scale_type=ScaleType.FP32).planned_bytes((3, 10, 100)) == 30 * 104
    assert IntegerFormat(4, "channel").planned_bytes((10, 101)) == 10 * (51 + 2)
    assert IntegerFormat(4, 32, symmetric=False).planned_bytes((1, 96)) == 48 + 6 + 2
    assert FP16.planned_bytes((7,), source_itemsize=4) == 14
    assert NONE.planned_bytes((7, 2), source_itemsize=4) == 56


@pytest.mark.parametrize("chosen", [IntegerFormat(8), PaletteFormat()])
def test_only_matrices_have_a_size_in_a_format_with_codes(chosen: IntegerFormat | PaletteFormat) -> None:
    with pytest.raises(UsageError, match="only matrices"):
        chosen.planned_bytes((128,))


def test_bytes_of_palettes() -> None:
    """Half a byte for each weight, and 16 values in half precision for each group of rows."""
    assert PaletteFormat(rows=8).planned_bytes((64, 32)) == 64 * 32 // 2 + 8 * 32
    assert PaletteFormat().planned_bytes((3, 32, 100)) == 3 * (1600 + 2 * 32)


@pytest.mark.parametrize(("rows", "shared"), [(256, 16), (24, 12), (50257, 1), (10, 10), (17, 1)])
def test_auto_shares_a_palette_among_the_most_rows_that_divide(rows: int, shared: int) -> None:
    assert PaletteFormat().resolve(rows, "w") == PaletteFormat(rows=shared)


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"layers.0.up: palettes of 16 rows do not divide its 24 rows"):
        PaletteFormat(rows=16).resolve(24, "layers.0.up")


@pytest.mark.parametrize(("dimension", "found"), [(128, 32), (96, 32), (48, "channel"), (16, "channel")])
def test_blocks_of_32_where_they_divide(dimension: int, found: object) -> None:
    form = parse_format("int4:auto32")
    assert isinstance(form, IntegerFormat)
    assert form.resolve(dimension, "w").granularity == found
    assert form.block_length(dimension) == (32 if found == 32 else dimension)
