"""Keeps the codes of a checkpoint that is stored quantized, bit for bit, where a target supports their grid.

The grid of a weight is the set of values that its format can represent: bits, block size and zero points. Codes,
scales and zero points go through the same stacking, concatenating and transposing as their weights
(`LazyTensor.map_sources`). The result has a grid if its last axis still consists of blocks with one scale each. Codes
are integers, or indices into one lookup table for the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError
from moec.compiler.ir.encoded_weights import Encoded, FromFunction, PerBlock
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.formats import BLOCK_SIZES, Activations, IntegerFormat, ScaleType, TableFormat, parse_supported
from moec.quantize.lazy import Coded, GivenCodes
from moec.quantize.methods.palettize import PalettizedTensor
from moec.quantize.methods.rounding import relative
from moec.quantize.methods.tensors import QuantizedTensor

KeptFormat: TypeAlias = IntegerFormat | TableFormat

ONLY_SOME = "only some of its parts are stored quantized"
ROUNDED_SCALES = "its scales are rounded to half precision, the dtype in which the target stores them"


@dataclass(frozen=True)
class SupportedFormats:
    """The formats that a target supports, as functions from a tensor class to text forms.

    Attributes:
        codes: Formats whose codes the target can store unchanged, together with scales of half precision or, with
            `fp32`, also of single precision.
        formats: Formats that the target supports for newly rounded weights.
        activations: What kernels round activations to where a recipe does not say, see `Target.fast_activations`.
    """

    codes: Callable[[str], Sequence[str]] = lambda _: ()
    formats: Callable[[str], Sequence[str]] = lambda _: ()
    activations: Activations = Activations.FLOAT

    def kept(self, tensor_class: str, fmt: KeptFormat) -> KeptFormat | None:
        """`fmt` with the target's activations, if the target can store its codes and scales unchanged; else None."""
        for offered in map(parse_supported, self.codes(tensor_class)):
            if not isinstance(offered, KeptFormat) or offered.grid != fmt.grid:
                continue
            if fmt.scale_type not in (ScaleType.FP16, offered.scale_type):
                continue
            if isinstance(offered, IntegerFormat) and isinstance(fmt, IntegerFormat):
                dynamic = offered.activations is not Activations.FLOAT
                return replace(fmt, activations=offered.activations) if dynamic else fmt
            return fmt
        return None

    def nearest(self, tensor_class: str, grid: Grid, columns: int) -> IntegerFormat | None:
        """The format to round to if a grid cannot be kept: with as many bits, else 8, and the smallest fitting blocks.

        None if the target supports no such format.
        """
        offered = _symmetric_forms(self.formats(tensor_class))
        if not any(fmt.granularity == "channel" for fmt in offered):
            offered += _symmetric_forms(self.codes(tensor_class))
        fitting = [fmt for fmt in offered if fmt.granularity == "channel" or columns % int(fmt.granularity) == 0]
        wide = [fmt for fmt in fitting if fmt.bits == 8]
        alike = [fmt for fmt in fitting if fmt.bits == (4 if grid.bits <= 4 else 8)]
        return min(alike or wide, key=lambda fmt: fmt.block_length(columns), default=None)


def _symmetric_forms(texts: Sequence[str]) -> list[IntegerFormat]:
    return [fmt for text in texts if isinstance(fmt := parse_supported(text), IntegerFormat) and fmt.symmetric]


@dataclass(frozen=True)
class Kept(GivenCodes):
    """A weight with the codes of the checkpoint; `source` is the dequantized weight.

    Attributes:
        codes: The codes, int8, in the shape of the weight.
        scales: The scale of each element, in the shape of the weight.
        zeros: The zero point of each element, in the shape of the weight; None where all are 0.
        exact: Whether the format stores all scales without rounding.
    """

    codes: LazyTensor | None = None
    scales: LazyTensor | None = None
    zeros: LazyTensor | None = None
    exact: bool = True

    def errors(self) -> list[float]:
        """Relative squared error of rounding the scales, as in `Coded.errors`; 0 if `exact`."""
        return [0.0] if self.exact else super().errors()

    def _quantize(self, start: int, stop: int) -> QuantizedTensor:
        assert self.codes is not None
        assert self.scales is not None
        scales = _by_block(self.scales.rows(start, stop), self.block, self.name).to(self.format.scale_type.dtype)
        zero_points = None
        if self.zeros is not None:
            zero_points = _by_block(self.zeros.rows(start, stop), self.block, self.name).to(torch.int8)
        part = QuantizedTensor(self.format, self.codes.rows(start, stop), scales, zero_points)
        if not self.exact:
            self._errors[start, stop] = (_loss(part.dequantize(), self.source.rows(start, stop)),)
        return part


@dataclass(frozen=True)
class KeptTable(Coded):
    """A weight with the codes of the checkpoint, which are indices into one lookup table.

    Attributes:
        name: Name of the tensor, for messages.
        source: The dequantized weight.
        format: Its format.
        codes: The indices, uint8, in the shape of the weight.
        scales: The scale of each element, in the shape of the weight.
        table: The lookup table [2 ** bits], whose values are exact in half precision.
        exact: Whether the format stores all scales without rounding.
    """

    name: str
    source: LazyTensor
    format: TableFormat
    codes: LazyTensor
    scales: LazyTensor
    table: Tensor
    exact: bool = True
    _errors: dict[tuple[int, int], float] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, start: int, stop: int) -> Tensor:
        """The slice, dequantized."""
        return self.palettized_rows(start, stop).dequantize()

    def palettized_rows(self, start: int, stop: int) -> PalettizedTensor:
        """Codes, table and scales of the slice [start, stop) along axis 0; each matrix has one palette, the table."""
        codes = self.codes.rows(start, stop)
        scales = _by_block(self.scales.rows(start, stop), self.format.block, self.name)
        table = self.table.to(torch.float16).expand(*codes.shape[:-2], 1, -1)
        part = PalettizedTensor(self.format, codes, table, scales.to(self.format.scale_type.dtype))
        if not self.exact:
            self._errors[start, stop] = _loss(part.dequantize(), self.source.rows(start, stop))
        return part

    def errors(self) -> list[float]:
        """See `Kept.errors`."""
        return [0.0] if self.exact else [error for _, error in sorted(self._errors.items())]


@dataclass(frozen=True)
class Grid:
    """The grid of a weight in the Program, whose parts are stored quantized.

    Attributes:
        kinds: Stored formats of its parts, such as GPTQ.
        bits: Bits per code in the checkpoint.
        format: The format that holds the codes unchanged; None if there is none.
        reason: Why there is no such format.
        near_half: Whether rounding to half precision changes no scale by more than one part in 2048.
    """

    kinds: tuple[str, ...]
    bits: int
    format: KeptFormat | None
    reason: str = ""
    near_half: bool = False

    def __str__(self) -> str:
        return f"{' and '.join(self.kinds)} of {self.bits} bits"

    def forms(self) -> Iterator[tuple[KeptFormat, str]]:
        """Formats that hold the codes unchanged, each with a text on how its scales change; empty if they do not."""
        if self.format is not None:
            yield self.format, ""
            if self.format.scale_type is ScaleType.FP32 and self.near_half:
                yield replace(self.format, scale_type=ScaleType.FP16), ROUNDED_SCALES


def grid_of(tensor: LazyTensor) -> Grid | None:
    """The grid of a weight; None if it is not stored quantized."""
    leaves = _leaves(tensor)
    encoded = [leaf for leaf in leaves if isinstance(leaf, Encoded)]
    if not encoded:
        return None
    kinds, bits = tuple(sorted({leaf.kind for leaf in encoded})), max(leaf.bits for leaf in encoded)

    found = _format(tensor, encoded, bits) if len(encoded) == len(leaves) else ONLY_SOME
    if isinstance(found, str):
        return Grid(kinds, bits, None, found)
    exact, near = (all(_scales_are(kind, leaf.scales) for leaf in encoded) for kind in (_exact_in_half, _near_half))
    return Grid(kinds, bits, replace(found, scale_type=ScaleType.FP16 if exact else ScaleType.FP32), near_half=near)


def _format(tensor: LazyTensor, leaves: Sequence[Encoded], bits: int) -> KeptFormat | str:
    """The format that holds the codes of a weight, regardless of the dtype of its scales; or why there is none."""
    table, columns = _common_table(leaves), tensor.shape[-1]
    if (table is None and not all(leaf.whole for leaf in leaves)) or len({leaf.bits for leaf in leaves}) > 1:
        return "its codes are neither integers of one bit width nor indices into one lookup table"
    if bits not in {4, 8}:
        return f"no target supports codes of {bits} bits"
    blocks = _view(tensor, _blocks)
    if blocks is None:
        return "it is computed from its codes, not only rearranged"
    length = _common_run(blocks)
    if table is not None:
        return TableFormat(length)
    if length != columns and length not in BLOCK_SIZES:
        return f"its scales are shared by runs of {length} of {columns} columns"
    symmetric = _symmetric(tensor)
    if not symmetric and bits == 8:
        return "it has zero points, but int8 is symmetric"
    if not symmetric and not _fit(tensor, -(1 << (bits - 1)), (1 << (bits - 1)) - 1):
        return "a zero point is outside the range of its codes"
    granularity: Any = "channel" if length == columns else length
    return IntegerFormat(4 if bits == 4 else 8, granularity, symmetric)


def kept(name: str, tensor: LazyTensor, fmt: KeptFormat, *, exact: bool) -> Kept | KeptTable:
    """`tensor`, whose grid is `fmt`, with its stored codes; `exact`: whether `fmt` stores its scales unchanged."""
    codes, scales = _view(tensor, lambda leaf: leaf.codes), _view(tensor, lambda leaf: leaf.scales)
    if isinstance(fmt, IntegerFormat):
        zeros = None if fmt.symmetric else _view(tensor, _zeros)
        return Kept(name, tensor, fmt, codes=codes, scales=scales, zeros=zeros, exact=exact)
    table = _common_table([leaf for leaf in _leaves(tensor) if isinstance(leaf, Encoded)])
    codes = _view(tensor, lambda leaf: leaf.indices)
    assert codes is not None
    assert scales is not None
    assert table is not None
    return KeptTable(name, tensor, fmt, codes, scales, table, exact)


def _view(tensor: LazyTensor, part: Callable[[Encoded], LazyTensor | None]) -> LazyTensor | None:
    return tensor.map_sources(lambda leaf: part(leaf) if isinstance(leaf, Encoded) else None)


def _leaves(tensor: LazyTensor) -> list[LazyTensor]:
    """The stored tensors that a weight consists of; the weight itself if it is computed from them."""
    found: list[LazyTensor] = []

    def note(leaf: LazyTensor) -> LazyTensor:
        found.append(leaf)
        return leaf

    return found if tensor.map_sources(note) is not None else [tensor]


def _zeros(leaf: Encoded) -> LazyTensor:
    if leaf.zeros is not None:
        return leaf.zeros
    return FromFunction(
        leaf.shape, torch.int8, lambda start, stop: torch.zeros(stop - start, *leaf.shape[1:], dtype=torch.int8)
    )


def _blocks(leaf: Encoded) -> LazyTensor:
    """A number for each element that identifies its block: different for each block and row."""
    columns = leaf.shape[-1]
    index = torch.arange(columns) // leaf.scales.block[1]
    if leaf.scales.index is not None:
        index = leaf.scales.index.read().to(torch.int64)
    count = int(index.max()) + 1

    def numbers(start: int, stop: int) -> Tensor:
        rows = torch.arange(leaf.shape[-2]) if len(leaf.shape) > 2 else torch.arange(start, stop)
        value = rows[:, None] * count + index
        return value.expand(stop - start, *leaf.shape[1:]) if len(leaf.shape) > 2 else value

    return FromFunction(leaf.shape, torch.int64, numbers)


def _common_run(blocks: LazyTensor) -> int:
    """Greatest common divisor of the lengths of all runs of equal numbers in the rows."""
    value = blocks.rows(0, 1)
    flat = value.reshape(-1, value.shape[-1])
    length = flat.shape[-1]
    changed = (flat[:, 1:] != flat[:, :-1]).any(0).nonzero().flatten() + 1
    return math.gcd(length, *changed.tolist())


def _common_table(leaves: Sequence[Encoded]) -> Tensor | None:
    """The lookup table that all leaves share; None if they share none, or if it is not exact in half precision."""
    tables = [leaf.table for leaf in leaves if leaf.table is not None]
    if len(tables) < len(leaves) or not all(torch.equal(table, tables[0]) for table in tables):
        return None
    return tables[0] if bool(_exact_in_half(tables[0].to(torch.float32)).all()) else None


def _scales_are(kind: Callable[[Tensor], Tensor], scales: PerBlock) -> bool:
    if scales.dtype == torch.float16:
        return True
    return all(bool(kind(part.to(torch.float32)).all()) for part in scales.source.chunks())


def _exact_in_half(values: Tensor) -> Tensor:
    return values.to(torch.float16).to(torch.float32) == values


def _near_half(values: Tensor) -> Tensor:
    limits = torch.finfo(torch.float16)
    return ((values >= limits.tiny) & (values <= limits.max)) | _exact_in_half(values)


def _loss(found: Tensor, source: Tensor) -> float:
    """Squared error divided by the squared norm of `source`."""
    exact = source.to(torch.float32)
    change = (found - exact).square_().sum(dtype=torch.float64)
    return relative(float(change), float(exact.square().sum(dtype=torch.float64)))


def _symmetric(tensor: LazyTensor) -> bool:
    return _fit(tensor, 0, 0)


def _fit(tensor: LazyTensor, low: int, high: int) -> bool:
    """Whether every zero point lies in [low, high]."""
    return all(
        bool(((part >= low) & (part <= high)).all())
        for leaf in _leaves(tensor)
        if isinstance(leaf, Encoded) and leaf.zeros is not None
        for part in leaf.zeros.source.chunks()
    )


def _by_block(values: Tensor, block: int, name: str) -> Tensor:
    """One value for each block along the last axis.

    Raises:
        CheckpointError: The values of a block differ.
    """
    groups = values.unflatten(-1, (-1, block))  # type: ignore[no-untyped-call]
    if not bool((groups == groups[..., :1]).all()):
        raise CheckpointError(
            f"{name}: its parts are quantized in different blocks of columns",
            hint="export without --quantize keep",
        )
    first: Tensor = groups[..., 0]
    return first
