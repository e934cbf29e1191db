"""Number formats as frozen dataclasses, each with a short text form such as `int4:32` or `int8:channel`.

Recipes, the command line and the manifest use the text form. Its first word is the kind; the others may come in any
order, and defaults may be left out:

    none                      the dtype of the checkpoint, unchanged
    fp16                      IEEE half precision
    int8[:auto|auto32|channel|32|64|128][:fp16|bf16|fp32][:float|int8-dynamic]
    int4[:auto|auto32|channel|32|64|128][:sym|asym][:fp16|bf16|fp32][:float|int8-dynamic]
    palettize4[:auto|ROWS]

`auto` is the largest of 128, 64 and 32 that divides the quantized dimension, else `channel`; `auto32` is 32 if it
divides the dimension, else `channel`. `fp16`, `bf16` and `fp32` are dtypes of the scales, `float` and `int8-dynamic`
those of the activations. ROWS is the number of rows that share a palette; `auto` is the largest divisor of the number
of rows up to 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from moec.compiler.common.errors import UsageError
from moec.compiler.common.validation import unknown

if TYPE_CHECKING:
    import torch

HALF_BYTES = 2
"""Bytes of a number in half precision."""
BLOCK_SIZES: tuple[Literal[128, 64, 32], ...] = (128, 64, 32)
ROWS = 16
"""Maximum number of rows that share a palette with `auto`: the palette is then small compared with their codes."""

Granularity: TypeAlias = Literal["auto", "auto32", "channel", 32, 64, 128]


class FloatKind(StrEnum):
    """How a tensor that is not quantized is stored."""

    NONE = "none"
    FP16 = "fp16"


class ScaleType(StrEnum):
    """The dtype of the scales.

    Scales of BF16 are exact in both bfloat16 and IEEE half precision.
    """

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        import torch  # not above: formats are parsed before anything takes seconds to import

        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.value]


class Activations(StrEnum):
    """The type of the activations in products with a quantized weight."""

    FLOAT = "float"
    INT8_DYNAMIC = "int8-dynamic"


@dataclass(frozen=True)
class FloatFormat:
    """A float format, without codes and scales."""

    kind: FloatKind = FloatKind.NONE

    def __str__(self) -> str:
        return self.kind.value

    def planned_bytes(self, shape: Sequence[int], *, source_itemsize: int) -> int:
        """Bytes of a tensor of `shape` whose checkpoint dtype takes `source_itemsize` bytes."""
        itemsize = source_itemsize if self.kind is FloatKind.NONE else 2
        return math.prod(shape) * itemsize


@dataclass(frozen=True)
class IntegerFormat:
    """Integer codes with one scale per block of the last dimension, or per output channel.

    Attributes:
        bits: Bits per code.
        granularity: Weights that share a scale: a block size, "channel" for the whole last dimension, or
            "auto" and "auto32", which depend on the length of that dimension.
        symmetric: True: weight = code * scale. False: weight = (code - zero_point) * scale; four bits only.
        scale_type: dtype of the scales.
        activations: Whether a kernel may quantize the activations, per token, to int8.
    """

    bits: Literal[4, 8]
    granularity: Granularity = "auto"
    symmetric: bool = True
    scale_type: ScaleType = ScaleType.FP16
    activations: Activations = Activations.FLOAT

    def __post_init__(self) -> None:
        if self.bits == 8 and not self.symmetric:
            raise UsageError(
                "format int8:asym does not exist: int8 is symmetric in moec",
                hint="write int8, or int4:asym",
            )

    def __str__(self) -> str:
        words = [f"int{self.bits}"]
        if self.granularity != "auto":
            words.append(str(self.granularity))
        if not self.symmetric:
            words.append("asym")
        if self.scale_type is not ScaleType.FP16:
            words.append(self.scale_type.value)
        if self.activations is not Activations.FLOAT:
            words.append(self.activations.value)
        return ":".join(words)

    @property
    def grid(self) -> str:
        """The text form without the words for scales and activations."""
        return str(replace(self, scale_type=ScaleType.FP16, activations=Activations.FLOAT))

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code. int8 excludes -128, which TFLite's symmetric kernels do not support."""
        return (-8, 7) if self.bits == 4 else (-127, 127)

    def resolve(self, dimension: int, name: str) -> IntegerFormat:
        """Turn "auto" and "auto32" into a block size and check that the block divides the dimension.

        Args:
            dimension: Length of the quantized (last) dimension.
            name: Name of the tensor, for the error.

        Raises:
            UsageError: The block size asked for does not divide `dimension`.
        """
        if self.granularity == "auto":
            return replace(self, granularity=default_block(dimension))
        if self.granularity == "auto32":
            return replace(self, granularity="channel" if dimension % 32 else 32)
        if self.granularity != "channel" and dimension % self.granularity:
            divisors = [str(size) for size in reversed(BLOCK_SIZES) if dimension % size == 0]
            raise UsageError(
                f"{name}: block size {self.granularity} does not divide its dimension {dimension}",
                hint=f"use block size {' or '.join(divisors)}" if divisors else _CHANNEL_HINT,
            )
        return self

    def block_length(self, dimension: int, name: str = "tensor") -> int:
        """Weights that share one scale, in a last dimension of length `dimension`."""
        granularity = self.resolve(dimension, name).granularity
        return granularity if isinstance(granularity, int) else dimension

    def planned_bytes(self, shape: Sequence[int], *, source_itemsize: int = 2) -> int:
        """Bytes of the codes, scales and zero points of a tensor of `shape` [..., N, K].

        Args:
            shape: Shape of the float tensor.
            source_itemsize: Not used; all formats have this parameter.

        Raises:
                UsageError: The tensor is not a matrix, or the block does not divide K.
        """
        del source_itemsize
        check_matrix(shape, self)
        rows, dimension = math.prod(shape[:-1]), shape[-1]
        groups = dimension // self.block_length(dimension, f"tensor of shape {tuple(shape)}")
        codes = (dimension * self.bits + 7) // 8
        zero_points = 0 if self.symmetric else (groups * self.bits + 7) // 8
        return rows * (codes + groups * self.scale_type.dtype.itemsize + zero_points)


@dataclass(frozen=True)
class PaletteFormat:
    """Codes that are indices into a palette: a lookup table of arbitrary values, one for each group of rows.

    Attributes:
        bits: Bits per code; a palette has 2^bits half-precision entries.
        rows: Rows (output channels) of a matrix that share a palette, or "auto".
    """

    scale_type: ClassVar[ScaleType] = ScaleType.FP16
    """dtype of the entries of a palette, which replace scales."""

    bits: Literal[4] = 4
    rows: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.rows != "auto" and self.rows < 1:
            raise UsageError(f"format palettize{self.bits}: {self.rows} rows cannot share a palette", hint=_ROWS_HINT)

    def __str__(self) -> str:
        return f"palettize{self.bits}" + ("" if self.rows == "auto" else f":{self.rows}")

    @property
    def entries(self) -> int:
        """Number of values in a palette."""
        return 1 << self.bits

    def resolve(self, rows: int, name: str) -> PaletteFormat:
        """Turn "auto" into a number of rows and check that it divides the rows of a matrix.

        Args:
            rows: Rows of the matrix.
            name: Name of the tensor, for the error.

        Raises:
            UsageError: The number asked for does not divide `rows`.
        """
        if self.rows == "auto":
            return replace(self, rows=next(size for size in range(ROWS, 0, -1) if rows % size == 0))
        if rows % self.rows:
            raise UsageError(f"{name}: palettes of {self.rows} rows do not divide its {rows} rows", hint=_ROWS_HINT)
        return self

    def palettes(self, rows: int, name: str = "tensor") -> int:
        """Number of palettes of a matrix with `rows` rows."""
        shared = self.resolve(rows, name).rows
        assert isinstance(shared, int)
        return rows // shared

    def planned_bytes(self, shape: Sequence[int], *, source_itemsize: int = 2) -> int:
        """Bytes of the codes and palettes of a tensor of `shape` [..., N, K].

        Args:
            shape: Shape of the float tensor.
            source_itemsize: Not used; all formats have this parameter.

        Raises:
                UsageError: The tensor is not a matrix, or its rows cannot be grouped.
        """
        del source_itemsize
        check_matrix(shape, self)
        matrices, rows, dimension = math.prod(shape[:-2]), shape[-2], shape[-1]
        codes = (rows * dimension * self.bits + 7) // 8
        tables = self.palettes(rows, f"tensor of shape {tuple(shape)}") * self.entries * HALF_BYTES
        return matrices * (codes + tables)


@dataclass(frozen=True)
class TableFormat:
    """Codes that are indices into one lookup table for the whole tensor, times a scale per block of the last axis.

    This format holds weights that a checkpoint stores as 4-bit floats (MXFP4, NVFP4). A plan cannot ask for it: it only
    keeps codes of a checkpoint (`quantize.keep`). Its text form is `table4:32` or `table4:32:fp32`.

    Attributes:
        block: Block size: number of weights that share a scale.
        scale_type: dtype of the scales.
        bits: Bits per code; the table has 2^bits values.
    """

    block: int
    scale_type: ScaleType = ScaleType.FP16
    bits: ClassVar[int] = 4

    def __str__(self) -> str:
        return self.grid if self.scale_type is ScaleType.FP16 else f"{self.grid}:{self.scale_type.value}"

    @property
    def grid(self) -> str:
        """The text form without the word for scales."""
        return f"table{self.bits}:{self.block}"

    def planned_bytes(self, shape: Sequence[int], *, source_itemsize: int = 2) -> int:
        """Bytes of the codes, scales and table of a tensor of `shape` [..., N, K]; the table is half-precision.

        Args:
            shape: Shape of the float tensor.
            source_itemsize: Not used; all formats have this parameter.
        """
        del source_itemsize
        rows, dimension = math.prod(shape[:-1]), shape[-1]
        table = (1 << self.bits) * HALF_BYTES * math.prod(shape[:-2])
        return rows * (dimension * self.bits // 8 + dimension // self.block * self.scale_type.dtype.itemsize) + table


Format: TypeAlias = FloatFormat | IntegerFormat | PaletteFormat

NONE = FloatFormat(FloatKind.NONE)
FP16 = FloatFormat(FloatKind.FP16)
KINDS = ("none", "fp16", "int8", "int4", "palettize4")
"""First words of the text forms that a plan may use."""
_ROWS_HINT = "write palettize4, which chooses a number that divides, or a divisor such as palettize4:8"
_CHANNEL_HINT = "use one scale per channel (int8:channel), or leave the tensor float (none)"
_WORDS: dict[str, tuple[str, object]] = {
    "auto": ("granularity", "auto"),
    "auto32": ("granularity", "auto32"),
    "channel": ("granularity", "channel"),
    **{str(size): ("granularity", size) for size in BLOCK_SIZES},
    "sym": ("symmetric", True),
    "asym": ("symmetric", False),
    **{kind.value: ("scale_type", kind) for kind in ScaleType},
    **{kind.value: ("activations", kind) for kind in Activations},
}


def default_block(dimension: int) -> Granularity:
    """The largest block size that divides `dimension`, or "channel" if none does."""
    return next((size for size in BLOCK_SIZES if dimension % size == 0), "channel")


def parse_format(text: str) -> Format:
    """Read the text form of a format; `str(format)` is its inverse.

    Raises:
        UsageError: The text is not a format; the hint names the nearest valid word.
    """
    kind, *words = text.strip().lower().split(":")
    if kind in {"none", "fp16"}:
        if words:
            raise UsageError(f"format {text!r}: {kind} takes no further words", hint=f"write {kind}")
        return FloatFormat(FloatKind(kind))
    if kind not in KINDS:
        raise unknown(text, KINDS, "unknown format", "the formats")
    if kind == "palettize4":
        return _parse_palette(text, words)
    fields: dict[str, object] = {}
    for word in words:
        if word not in _WORDS:
            raise unknown(word, _WORDS, f"format {text!r}: unknown word", "the words")
        field, value = _WORDS[word]
        if field in fields:
            raise UsageError(f"format {text!r}: {word!r} contradicts an earlier word", hint="keep one of them")
        fields[field] = value
    return IntegerFormat(bits=4 if kind == "int4" else 8, **fields)  # type: ignore[arg-type]


def parse_supported(text: str) -> Format | TableFormat:
    """Read the text form of a format that a target supports: one that a plan may use, or a `TableFormat`.

    Raises:
        UsageError: The text is not a format.
    """
    kind, *words = text.split(":")
    if kind != f"table{TableFormat.bits}":
        return parse_format(text)
    return TableFormat(int(words[0]), ScaleType(words[1]) if len(words) > 1 else ScaleType.FP16)


def _parse_palette(text: str, words: list[str]) -> PaletteFormat:
    if len(words) > 1 or not all(word == "auto" or word.isdecimal() for word in words):
        raise UsageError(f"format {text!r}: palettize4 takes at most a number of rows", hint=_ROWS_HINT)
    return PaletteFormat(rows=int(words[0]) if words and words[0] != "auto" else "auto")


def check_matrix(shape: Sequence[int], chosen: Format) -> None:
    """Check that a tensor is a matrix or a stack of matrices.

    Raises:
        UsageError: `shape` has fewer than two dimensions.
    """
    if len(shape) < 2:
        raise UsageError(
            f"a tensor of shape {tuple(shape)} cannot take the format {chosen}: only matrices are quantized",
            hint="leave norms and biases float",
        )
