"""A weight that a plan quantizes, as a lazy tensor: the interpreter reads it dequantized, a target reads its codes.

That is the one way in which a plan reaches a target: `program.weights[name]` is a `Quantized`, or it stays float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.weights import LazyTensor
from moec.quantize.formats import IntegerFormat
from moec.quantize.rounding import RoundingResult, round_to_nearest
from moec.quantize.scales import NO_CLIPPING, ClipSearch
from moec.quantize.tensors import QuantizedTensor, stack


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales [..., N, groups] and zero points (None where symmetric) of some rows."""

    scales: Tensor
    zero_points: Tensor | None

    def unsigned_zero_points(self) -> Tensor:
        """Zero points of unsigned 4-bit codes, uint8."""
        assert self.zero_points is not None
        return (self.zero_points.to(torch.int16) + 8).to(torch.uint8)


@dataclass(frozen=True)
class Quantized(LazyTensor):
    """`source` [N, K] or [E, N, K], rounded to `format`.

    Attributes:
        name: Name of the tensor, for messages.
        source: The float weights, of which only the rows asked for are read.
        format: Its format, with the block size resolved.
        clip: Clip ratios that rounding to nearest tries.
        rounded: Codes that calibration has chosen, one QuantizedTensor per expert ([N, K]: one in all). Empty: round
            to nearest whenever rows are read, which always gives the same codes and keeps nothing in memory.
        reported: Relative squared error of each of `rounded`.
    """

    name: str
    source: LazyTensor
    format: IntegerFormat
    clip: ClipSearch = NO_CLIPPING
    rounded: Sequence[QuantizedTensor] = ()
    reported: Sequence[float] = ()
    _seen: list[tuple[int, int, Scales]] = field(default_factory=list, repr=False, compare=False)
    _errors: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the float tensor."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """float32: what codes times scales gives, whatever the checkpoint was stored in."""
        return torch.float32

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return self.format.block_length(self.shape[-1], self.name)

    def rows(self, start: int, stop: int) -> Tensor:
        """The slice as the artifact will hold it: rounded and dequantized."""
        return self.quantized_rows(start, stop).dequantize(self.dtype)

    def quantized_rows(self, start: int, stop: int) -> QuantizedTensor:
        """Codes and scales of the slice [start, stop) along axis 0."""
        part = self._quantize(start, stop)
        self._seen.append((start, stop, Scales(part.scales, part.zero_points)))
        return part

    def scale_rows(self, start: int, stop: int) -> Scales:
        """Scales and zero points of the slice, without rounding anew what was rounded before."""
        covered, pieces = 0, []
        for first, last, scales in sorted(self._seen, key=lambda entry: entry[:2]):
            if first == covered:
                pieces.append(scales)
                covered = last
        if covered != self.shape[0]:
            part = self.quantized_rows(start, stop)
            return Scales(part.scales, part.zero_points)
        points = [piece.zero_points for piece in pieces if piece.zero_points is not None]
        return Scales(
            torch.cat([piece.scales for piece in pieces])[start:stop],
            torch.cat(points)[start:stop] if points else None,
        )

    def errors(self) -> list[float]:
        """Squared error over squared norm of each matrix (of each slice of rows) that has been rounded so far."""
        if self.rounded:
            return list(self.reported)
        return [error for _, errors in sorted(self._errors.items()) for error in errors]

    def _quantize(self, start: int, stop: int) -> QuantizedTensor:
        if not self.rounded:
            result = round_to_nearest(self.source.rows(start, stop), self.format, name=self.name, clip=self.clip)
            self._errors[start, stop] = tuple(report.error for report in result.matrices)
            return result.tensor
        if len(self.shape) == 3:
            return stack(list(self.rounded[start:stop]))
        whole = self.rounded[0]
        points = None if whole.zero_points is None else whole.zero_points[start:stop]
        return QuantizedTensor(whole.format, whole.codes[start:stop], whole.scales[start:stop], points)


def quantized(
    name: str,
    source: LazyTensor,
    fmt: IntegerFormat,
    result: RoundingResult | None = None,
    clip: ClipSearch = NO_CLIPPING,
) -> Quantized:
    """`source` in a format: with the codes that calibration has chosen, or rounded to nearest where there are none."""
    resolved = fmt.resolve(source.shape[-1], name)
    if result is None:
        return Quantized(name, source, resolved, clip)
    codes = result.tensor
    each = (codes,) if codes.codes.ndim == 2 else tuple(codes[index] for index in range(codes.codes.shape[0]))
    return Quantized(name, source, resolved, clip, each, tuple(item.error for item in result.matrices))


@dataclass(frozen=True)
class Float16(LazyTensor):
    """A float tensor that the plan stores in half precision whatever the graph computes in."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the source."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """float16."""
        return torch.float16

    def rows(self, start: int, stop: int) -> Tensor:
        """The slice, rounded to half precision."""
        return self.source.rows(start, stop).to(torch.float16)
