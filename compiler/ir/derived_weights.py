"""Lazy tensors that are views of others: reshaped, sliced or permuted.

A slice along axis 0 reads no more of the source than it needs, so one expert of a derived stack costs one expert of the
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ir.weights import Computed, LazyTensor, Leaf, Mapped


@dataclass(frozen=True)
class Reshaped(LazyTensor):
    """`source` reshaped to `shape`, in row-major order."""

    source: LazyTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the source."""
        return self.source.dtype

    def read(self) -> Tensor:
        """Read the source."""
        return self.source.read().reshape(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the rows of the source that hold the slice."""
        if not self.shape or not self.source.shape:
            return self.read()[start:stop] if self.shape else self.read()
        own, other = math.prod(self.shape[1:]), math.prod(self.source.shape[1:])
        if not own or not other:
            return self.read()[start:stop]
        start, stop = min(start, self.shape[0]), min(stop, self.shape[0])
        first, last = start * own // other, -(-stop * own // other)
        flat = self.source.rows(first, last).reshape(-1)
        return flat[start * own - first * other : stop * own - first * other].reshape(-1, *self.shape[1:])

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`."""
        source = self.source.map_sources(leaf)
        return None if source is None else Reshaped(source, self.shape)


@dataclass(frozen=True)
class Sliced(LazyTensor):
    """Rows `start` to `start + count` of `source` along axis 0."""

    source: LazyTensor
    start: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """`count` rows of the source."""
        return (self.count, *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the source."""
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the same rows of the source."""
        return self.source.rows(self.start + min(start, self.count), self.start + min(stop, self.count))

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`."""
        source = self.source.map_sources(leaf)
        return None if source is None else Sliced(source, self.start, self.count)


@dataclass(frozen=True)
class Member(LazyTensor):
    """Entry `index` of `source` along axis 0, such as one expert of a stack."""

    source: LazyTensor
    index: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the source without axis 0."""
        return self.source.shape[1:]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the source."""
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the entry whole, since a slice of the source has whole entries."""
        return self.source.rows(self.index, self.index + 1)[0, start:stop]


def permute(source: LazyTensor, order: Sequence[int]) -> LazyTensor:
    """The axes of `source` in another order, contiguous; computed row by row if axis 0 stays first."""
    order = [axis % len(source.shape) for axis in order]
    shape = tuple(source.shape[axis] for axis in order)

    def function(value: Tensor) -> Tensor:
        return value.permute(order).contiguous()

    if order and order[0] == 0:
        return Mapped(source, function, shape, source.dtype, moves=True)
    return Computed((source,), function, shape, source.dtype, moves=True)


def slice_axis(source: LazyTensor, axis: int, start: int, stop: int) -> LazyTensor:
    """The slice [start, stop) of `source` along `axis`; the bounds must be within the axis."""
    if axis == 0:
        return Sliced(source, start, stop - start)
    shape = (*source.shape[:axis], stop - start, *source.shape[axis + 1 :])

    def function(value: Tensor) -> Tensor:
        return value.narrow(axis, start, stop - start).contiguous()

    return Mapped(source, function, shape, source.dtype, moves=True)
