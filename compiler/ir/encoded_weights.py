"""Weights that a checkpoint stores as codes, as lazy tensors of their float values that keep the codes.

`weight = (code - zero point) * scale`. Codes, scales and zero points are lazy tensors of the shape of the weight, so
every operation that moves weights (`LazyTensor.map_sources`) can move them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ir.weights import LazyTensor


@dataclass(frozen=True)
class FromFunction(LazyTensor):
    """A tensor whose rows [start, stop) are the result of `make(start, stop)`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[int, int], Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        """Make the slice."""
        return self.make(min(start, self.shape[0]), min(stop, self.shape[0]))


@dataclass(frozen=True)
class PerBlock(LazyTensor):
    """One number per block of a matrix or stack, [..., R, C], repeated over the elements: [..., N, K].

    Attributes:
        source: The numbers.
        shape: [..., N, K].
        block: Rows and columns of a block; the last block of an axis may be partial.
        index: Block of each column, [K], if it is not `column // block[1]`.
    """

    source: LazyTensor
    shape: tuple[int, ...]
    block: tuple[int, int]
    index: LazyTensor | None = None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the numbers."""
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the numbers of the slice and repeat them."""
        part = self._by_group(start, min(stop, self.shape[0]))
        if self.index is not None:
            return part[..., self.index.read().to(torch.int64)]
        return part.repeat_interleave(self.block[1], -1)[..., : self.shape[-1]]

    def against(self, start: int, stop: int) -> tuple[Tensor, int]:
        """The numbers of the slice for a weight viewed as [..., N, K / width, width], and the width.

        The tensor broadcasts over the last axis, so it is small if all blocks are whole; otherwise the width is 1.
        """
        width = self.block[1]
        if self.index is not None or self.shape[-1] % width:
            return self.rows(start, stop).unsqueeze(-1), 1
        return self._by_group(start, min(stop, self.shape[0])).unsqueeze(-1), width

    def _by_group(self, start: int, stop: int) -> Tensor:
        """The numbers of the slice, [..., N, C]."""
        rows = self.block[0]
        if len(self.shape) > 2:
            part = self.source.rows(start, stop)
            return part.repeat_interleave(rows, -2)[..., : self.shape[-2], :] if rows > 1 else part
        first = start // rows
        part = self.source.rows(first, -(-stop // rows))
        return part.repeat_interleave(rows, 0)[start - first * rows : stop - first * rows] if rows > 1 else part


@dataclass(frozen=True)
class Encoded(LazyTensor):
    """A weight [..., N, K] that is stored as codes.

    Attributes:
        kind: Name of the format in reports.
        bits: Bits of a code in the file.
        whole: Whether codes are signed integers of `bits` bits, and not values of a table or floats.
        codes: The codes: integers, values of the table, or floats.
        scales: The scale of each element.
        zeros: The zero point of each element, or None.
        indices: Indices into the table, uint8, if the file holds indices into one table for the weight; else None.
        table: The values of the table, [2 ** bits]; None without indices.
    """

    kind: str
    bits: int
    whole: bool
    codes: LazyTensor
    scales: PerBlock
    zeros: PerBlock | None = None
    indices: LazyTensor | None = None
    table: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """float32, in which weights are decoded."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the codes."""
        return self.codes.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Decode the slice, computed in float32."""
        value = self.codes.rows(start, stop).to(torch.float32)
        if self.zeros is not None:
            zeros, width = self.zeros.against(start, stop)
            value.view(*value.shape[:-1], value.shape[-1] // width, width).sub_(zeros)
        scales, width = self.scales.against(start, stop)
        value.view(*value.shape[:-1], value.shape[-1] // width, width).mul_(scales)
        return value
