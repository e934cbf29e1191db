"""Quantized weights as lazy tensors: the interpreter reads them dequantized, a target reads their codes.

A plan reaches a target only in this way: `program.weights[name]` is a `Coded` if the weight is quantized. A `Coded`
is a `Quantized` (codes and scales), a `Palettized` (codes and palettes), or a `KeptTable` of `quantize.keep` (codes, a
lookup table and scales).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.ir.derived_weights import Member
from moec.compiler.ir.weights import Converted, LazyTensor
from moec.quantize.formats import IntegerFormat, PaletteFormat, TableFormat, check_matrix
from moec.quantize.methods.palettize import PalettizedTensor, choose_palettes, palettize
from moec.quantize.methods.rounding import RoundingResult, check_weight, nearest_values, relative, round_to_nearest
from moec.quantize.methods.scales import NO_CLIPPING, ClipSearch
from moec.quantize.methods.tensors import QuantizedTensor, join, stack

PIECE = 1 << 22
"""Number of weights of a matrix that are rounded, or clustered into palettes, at a time."""


CodedFormat = IntegerFormat | PaletteFormat | TableFormat
"""The formats of a `Coded`."""


class Coded(Converted):
    """A quantized tensor; `source` has the float weights."""

    format: CodedFormat

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """float32, in which the values of every format are exact."""
        return torch.float32

    @abstractmethod
    def errors(self) -> list[float]:
        """Squared error over squared norm of each matrix (of each slice of rows) that has been rounded so far."""


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales [..., N, groups] and zero points of the same shape (None if symmetric) of some rows."""

    scales: Tensor
    zero_points: Tensor | None

    def unsigned_zero_points(self) -> Tensor:
        """Zero points for unsigned 4-bit codes, uint8."""
        assert self.zero_points is not None
        return (self.zero_points.to(torch.int16) + 8).to(torch.uint8)


@dataclass(frozen=True)
class Quantized(Coded):
    """`source` [N, K] or [E, N, K], rounded to `format`.

    Attributes:
        name: Name of the tensor, for messages.
        source: The float weights, read slice by slice.
        format: Its format, with a resolved block size.
        clip: Clip ratios that rounding to nearest tries.
        rounded: Codes from calibration, one QuantizedTensor per expert (a single one for [N, K]). If empty, rows are
            rounded to nearest whenever they are read, which always gives the same codes and needs no memory.
        reported: Relative squared error of each of `rounded`.
    """

    name: str
    source: LazyTensor
    format: IntegerFormat
    clip: ClipSearch = NO_CLIPPING
    rounded: Sequence[QuantizedTensor] = ()
    reported: Sequence[float] = ()
    _seen: list[tuple[int, int, Scales]] = field(default_factory=list, repr=False, compare=False)
    _served: list[int] = field(default_factory=list, repr=False, compare=False)
    _errors: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def block(self) -> int:
        """Number of weights that share a scale."""
        return self.format.block_length(self.shape[-1], self.name)

    def rows(self, start: int, stop: int) -> Tensor:
        """The slice, rounded and dequantized. It is not cached."""
        if self.rounded:
            return self._quantize(start, stop).dequantize(self.dtype)
        steps = list(self._steps(start, stop))
        if len(steps) == 1:
            return self._nearest(*steps[0])
        values = torch.empty(stop - start, *self.shape[1:])  # joining the pieces would take twice the memory
        for first, last in steps:
            values[first - start : last - start] = self._nearest(first, last)
        return values

    def _nearest(self, start: int, stop: int) -> Tensor:
        return nearest_values(self.source.rows(start, stop), self.format, name=self.name, clip=self.clip)

    def quantized_rows(self, start: int, stop: int) -> QuantizedTensor:
        """Codes and scales of the slice [start, stop) along axis 0; the scales are cached for `scale_rows`."""
        part = self._quantize(start, stop)
        self._seen.append((start, stop, Scales(part.scales, part.zero_points)))
        return part

    def scale_rows(self, start: int, stop: int) -> Scales:
        """Scales and zero points of the slice, from the cache if `quantized_rows` has read all rows before.

        The cache is dropped when its last row has been read: once if the format is symmetric, otherwise twice, for
        scales and for zero points.
        """
        covered, pieces = 0, []
        for first, last, scales in sorted(self._seen, key=lambda entry: entry[:2]):
            if first == covered:
                pieces.append(scales)
                covered = last
        if covered != self.shape[0]:
            part = self.quantized_rows(start, stop)
            return Scales(part.scales, part.zero_points)
        zero_points = [piece.zero_points for piece in pieces if piece.zero_points is not None]
        if stop >= self.shape[0]:
            self._served.append(stop)
            if len(self._served) == (1 if self.format.symmetric else 2):
                self._seen.clear()
                self._served.clear()
        return Scales(
            torch.cat([piece.scales for piece in pieces])[start:stop],
            torch.cat(zero_points)[start:stop] if zero_points else None,
        )

    def members(self) -> tuple[Quantized, ...]:
        """The matrices [N, K] of a stack [E, N, K], each a tensor of its own with the same codes."""
        return tuple(
            _Member(f"{self.name}.{index}", Member(self.source, index), self.format, stack=self, index=index)
            for index in range(self.shape[0])
        )

    def errors(self) -> list[float]:
        """Squared error over squared norm of each matrix (of each slice of rows) that has been rounded so far."""
        if self.rounded:
            return list(self.reported)
        return [error for _, errors in sorted(self._errors.items()) for error in errors]

    def _quantize(self, start: int, stop: int) -> QuantizedTensor:
        if not self.rounded:
            return join([self._piece(first, last) for first, last in self._steps(start, stop)])
        if len(self.shape) == 3:
            return stack(list(self.rounded[start:stop]))
        whole = self.rounded[0]
        zero_points = None if whole.zero_points is None else whole.zero_points[start:stop]
        return QuantizedTensor(whole.format, whole.codes[start:stop], whole.scales[start:stop], zero_points)

    def _steps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Slices of one expert, or of some rows of a matrix, so that few float weights are in memory at a time."""
        step = 1 if len(self.shape) == 3 else max(1, PIECE // self.shape[1])
        for first in range(start, max(stop, start + 1), step):
            yield first, min(first + step, stop)

    def _piece(self, start: int, stop: int) -> QuantizedTensor:
        result = round_to_nearest(self.source.rows(start, stop), self.format, name=self.name, clip=self.clip)
        self._errors[start, stop] = tuple(report.error for report in result.matrices)
        return result.tensor


def quantized(
    name: str,
    source: LazyTensor,
    fmt: IntegerFormat,
    result: RoundingResult | None = None,
    clip: ClipSearch = NO_CLIPPING,
) -> Quantized:
    """`source` in the format `fmt`, with the codes of a calibration `result`, or rounded to nearest if it is None."""
    resolved = fmt.resolve(source.shape[-1], name)
    if result is None:
        return Quantized(name, source, resolved, clip)
    codes = result.tensor
    each = (codes,) if codes.codes.ndim == 2 else tuple(codes[index] for index in range(codes.codes.shape[0]))
    return Quantized(name, source, resolved, clip, each, tuple(item.error for item in result.matrices))


@dataclass(frozen=True)
class GivenCodes(Quantized):
    """`source` with given codes, which subclasses read in `_quantize`."""

    def rows(self, start: int, stop: int) -> Tensor:
        """The slice, dequantized from the given codes."""
        return self._quantize(start, stop).dequantize(self.dtype)

    @abstractmethod
    def _quantize(self, start: int, stop: int) -> QuantizedTensor:
        """The codes of the slice [start, stop) along axis 0."""


@dataclass(frozen=True)
class _Member(GivenCodes):
    """One matrix of a stack, whose errors the stack keeps."""

    stack: Quantized | None = None
    index: int = 0

    def _quantize(self, start: int, stop: int) -> QuantizedTensor:
        assert self.stack is not None
        own = self.stack._quantize(self.index, self.index + 1)[0]
        zero_points = None if own.zero_points is None else own.zero_points[start:stop]
        return QuantizedTensor(own.format, own.codes[start:stop], own.scales[start:stop], zero_points)


@dataclass(frozen=True)
class Palettized(Coded):
    """`source` [N, K] or [E, N, K] with a palette for each group of rows.

    Palettes are computed when rows are first read, and cached; they take 2 to 3 % of the memory of the codes.

    Attributes:
        name: Name of the tensor, for messages.
        source: The float weights, read slice by slice.
        format: Its format, with a resolved number of rows.
    """

    name: str
    source: LazyTensor
    format: PaletteFormat
    _palettes: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _errors: dict[tuple[int, int], float] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, start: int, stop: int) -> Tensor:
        """The slice, with every weight replaced by an entry of its palette."""
        step = self._step
        first, last = start // step * step, min(-(-stop // step) * step, self.shape[0])
        return self.palettized_rows(first, last).dequantize(self.dtype)[start - first : stop - first]

    def palettized_rows(self, start: int, stop: int) -> PalettizedTensor:
        """Codes and palettes of the slice [start, stop) along axis 0; a slice of rows must consist of whole groups."""
        step = self._step
        pieces = [self._piece(first, min(first + step, stop)) for first in range(start, stop, step)]
        return PalettizedTensor(
            self.format,
            torch.cat([piece.codes for piece in pieces]),
            torch.cat([piece.palettes for piece in pieces]),
        )

    def errors(self) -> list[float]:
        """See `Coded.errors`."""
        return [error for _, error in sorted(self._errors.items())]

    @property
    def _step(self) -> int:
        """Length of a piece along axis 0: one expert of a stack, or whole groups of rows of a matrix."""
        if len(self.shape) == 3:
            return 1
        rows = int(self.format.rows)
        return rows * max(1, PIECE // (rows * self.shape[1]))

    def _piece(self, start: int, stop: int) -> PalettizedTensor:
        weight = self.source.rows(start, stop)
        if (start, stop) not in self._palettes:
            check_weight(weight, self.name)
            self._palettes[start, stop] = choose_palettes(weight, self.format, name=self.name)
        part = palettize(weight, self._palettes[start, stop], self.format)
        if (start, stop) not in self._errors:
            exact = weight.to(torch.float32)
            lost = (part.dequantize() - exact).square_().sum(dtype=torch.float64)
            self._errors[start, stop] = relative(float(lost), float(exact.square().sum(dtype=torch.float64)))
        return part


def palettized(name: str, source: LazyTensor, fmt: PaletteFormat) -> Palettized:
    """`source` in the format `fmt`.

    Raises:
        UsageError: The tensor is not a matrix, or its rows cannot be grouped.
    """
    check_matrix(source.shape, fmt)
    return Palettized(name, source, fmt.resolve(source.shape[-2], name))


@dataclass(frozen=True)
class Float16(Converted):
    """A float tensor that the plan stores in half precision, whatever dtype the graph computes in."""

    source: LazyTensor

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """float16."""
        return torch.float16

    def rows(self, start: int, stop: int) -> Tensor:
        """The slice, rounded to half precision."""
        return self.source.rows(start, stop).to(torch.float16)
