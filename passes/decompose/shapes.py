"""Ops that move, slice and concatenate elements without computing on them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import fx

from moec.passes.decompose.builder import Builder, Rules
from moec.passes.rewriting import aten, size_of, tensor_shape

END = sys.maxsize
"""The end of an axis of any size."""


def _reshape(b: Builder, self: fx.Node, sizes: Any) -> fx.Node | None:
    done = b.node.target is aten.reshape.default
    return None if done else b(aten.reshape.default, self, list(sizes))


def _flatten(b: Builder, self: fx.Node, start_dim: int = 0, end_dim: int = -1) -> fx.Node:
    start, end = b.axis(self, start_dim), b.axis(self, end_dim)
    own = b.sizes(self)
    return b(aten.reshape.default, self, [*own[:start], -1, *own[end + 1 :]])


def _unflatten(b: Builder, self: fx.Node, dim: int, sizes: Sequence[Any]) -> fx.Node:
    axis, own = b.axis(self, dim), b.sizes(self)
    return b(aten.reshape.default, self, [*own[:axis], *sizes, *own[axis + 1 :]])


def _permute(b: Builder, self: fx.Node, dims: Sequence[int]) -> fx.Node | None:
    axes = [b.axis(self, axis) for axis in dims]
    done = b.node.target is aten.permute.default and list(dims) == axes
    return None if done else b(aten.permute.default, self, axes)


def _transpose(b: Builder, self: fx.Node, dim0: int, dim1: int) -> fx.Node:
    axes = list(range(self.meta["val"].ndim))
    first, second = b.axis(self, dim0), b.axis(self, dim1)
    axes[first], axes[second] = axes[second], axes[first]
    return b(aten.permute.default, self, axes)


def _reversed_axes(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.permute.default, self, list(reversed(range(self.meta["val"].ndim))))


def _move_axes(b: Builder, self: fx.Node, source: Any, destination: Any) -> fx.Node:
    sources, places = ([dim] if isinstance(dim, int) else dim for dim in (source, destination))
    order = {b.axis(self, place): b.axis(self, axis) for axis, place in zip(sources, places, strict=True)}
    rest = iter(axis for axis in range(self.meta["val"].ndim) if axis not in order.values())
    axes = [order[place] if place in order else next(rest) for place in range(self.meta["val"].ndim)]
    return b(aten.permute.default, self, axes)


def _unsqueeze(b: Builder, self: fx.Node, dim: int) -> fx.Node | None:
    axis = dim % (self.meta["val"].ndim + 1)
    return None if axis == dim else b(aten.unsqueeze.default, self, axis)


def _squeeze(b: Builder, self: fx.Node, dim: Any = None) -> fx.Node | None:
    shape = self.meta["val"].shape
    named = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = sorted({b.axis(self, axis) for axis in named if size_of(shape[axis]) == 1}) if len(shape) else []
    if not axes:
        return self
    done = b.node.target is aten.squeeze.dims and list(b.node.args[1]) == axes  # type: ignore[arg-type]
    return None if done else b(aten.squeeze.dims, self, axes)


def _expand(b: Builder, self: fx.Node, size: Sequence[Any], implicit: bool = False) -> fx.Node | None:  # noqa: ARG001
    return None if b.node.target is aten.expand.default else b(aten.expand.default, self, list(size))


def _expand_as(b: Builder, self: fx.Node, other: fx.Node) -> fx.Node:
    return b(aten.expand.default, self, b.sizes(other))


def _copy(b: Builder, self: fx.Node, src: fx.Node, non_blocking: bool = False) -> fx.Node:  # noqa: ARG001
    value: fx.Node = b.cast(src, b.dtype)
    return value if tensor_shape(src) == tensor_shape(self) else b(aten.expand.default, value, b.sizes(self))


def _repeat_interleave(
    b: Builder,
    self: fx.Node,
    repeats: int,
    dim: int | None = None,
    output_size: Any = None,  # noqa: ARG001
) -> fx.Node:
    axis = 0 if dim is None else b.axis(self, dim)
    value = b(aten.reshape.default, self, [-1]) if dim is None else self
    sizes = b.sizes(value)
    apart = b(aten.unsqueeze.default, value, axis + 1)
    repeated = b(aten.expand.default, apart, [*sizes[: axis + 1], repeats, *sizes[axis + 1 :]])
    return b(aten.reshape.default, repeated, [*sizes[:axis], -1, *sizes[axis + 1 :]])


def _slice(
    b: Builder, self: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> fx.Node | None:
    bounds = (b.axis(self, dim), 0 if start is None else start, END if end is None else end, step)
    return None if b.node.args[1:] == bounds else b(aten.slice.Tensor, self, *bounds)


def _narrow(b: Builder, self: fx.Node, dim: int, start: int, length: int) -> fx.Node:
    return b(aten.slice.Tensor, self, b.axis(self, dim), start, start + length, 1)


def _select(b: Builder, self: fx.Node, dim: int, index: Any) -> fx.Node | None:
    axis = b.axis(self, dim)
    return None if axis == dim else b(aten.select.int, self, axis, index)


def _unbind(b: Builder, self: fx.Node, dim: int = 0) -> list[fx.Node]:
    axis = b.axis(self, dim)
    return [b(aten.select.int, self, axis, index) for index in range(self.meta["val"].shape[axis])]


def _split(b: Builder, self: fx.Node, _size: Any, dim: int = 0) -> Any:
    """A split into pieces of static sizes; a split or chunk with dynamic sizes is not decomposed."""
    axis = b.axis(self, dim)
    sizes = [size_of(piece.shape[axis]) for piece in b.node.meta["val"]]
    if not all(isinstance(piece, int) for piece in sizes):
        return None
    if b.node.target is aten.split_with_sizes.default and b.node.args[1:] == (sizes, axis):
        return None
    return b(aten.split_with_sizes.default, self, sizes, axis)


def _cat(b: Builder, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node | None:
    parts, axis = [b.cast(item, b.dtype) for item in tensors], dim % b.node.meta["val"].ndim
    done = b.node.target is aten.cat.default and parts == list(tensors) and b.node.args[1:] == (axis,)
    return None if done else b(aten.cat.default, parts, axis)


def _stack(b: Builder, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node:
    axis = dim % b.node.meta["val"].ndim
    parts = [b(aten.unsqueeze.default, b.cast(item, b.dtype), axis) for item in tensors]
    return b(aten.cat.default, parts, axis)


def _slice_scatter(
    b: Builder,
    self: fx.Node,
    src: fx.Node,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> fx.Node | None:
    """Concatenate the part before the slice, the written tensor, and the part after it, along a static axis."""
    axis = b.axis(self, dim)
    length = self.meta["val"].shape[axis]
    if step != 1 or not isinstance(length, int):
        return None
    first, last, _ = slice(start, end).indices(length)
    parts = [
        *([b(aten.slice.Tensor, self, axis, 0, first, 1)] if first > 0 else []),
        b.cast(src, b.dtype),
        *([b(aten.slice.Tensor, self, axis, last, END, 1)] if last < length else []),
    ]
    return parts[0] if len(parts) == 1 else b(aten.cat.default, parts, axis)


def _select_scatter(b: Builder, self: fx.Node, src: fx.Node, dim: int, index: int) -> fx.Node | None:
    axis = b.axis(self, dim)
    length = self.meta["val"].shape[axis]
    if not isinstance(length, int):
        return None
    row = b(aten.unsqueeze.default, src, axis)
    return _slice_scatter(b, self, row, axis, index % length, index % length + 1)


def _pad(b: Builder, self: fx.Node, pad: Sequence[int], mode: str = "constant", value: Any = None) -> fx.Node | None:
    return b(aten.constant_pad_nd.default, self, list(pad), value or 0) if mode == "constant" else None


def _roll(b: Builder, self: fx.Node, shifts: Sequence[int], dims: Sequence[int] = ()) -> fx.Node | None:
    if len(shifts) != len(dims):
        return None
    value = self
    for shift, dim in zip(shifts, dims, strict=True):
        axis = b.axis(self, dim)
        cut = [b(aten.slice.Tensor, value, axis, *bounds, 1) for bounds in ((-shift, END), (0, -shift))]
        value = b(aten.cat.default, cut, axis)
    return value


RULES: Rules = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.swapaxes.default: _transpose,
    aten.movedim.int: _move_axes,
    aten.movedim.intlist: _move_axes,
    aten.t.default: _reversed_axes,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand_as,
    aten.broadcast_to.default: _expand,
    aten.copy.default: _copy,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.stack.default: _stack,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.pad.default: _pad,
    aten.roll.default: _roll,
}
