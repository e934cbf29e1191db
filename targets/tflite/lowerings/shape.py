"""Ops that move, cut, join and make tensors."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.tflite.context import Context, integer, listed, node_of, rank, result_dtype, shape_of
from moec.targets.tflite.lowerings.elementwise import Lowering, choose
from moec.targets.tflite.model import Value

aten = torch.ops.aten
END = sys.maxsize


def _reshape(ctx: Context, node: fx.Node) -> Value:
    return ctx.reshape(ctx.tensor(node.args[0]), tuple(node.meta["val"].shape))


def _permute(ctx: Context, node: fx.Node) -> Value:
    count = rank(node.args[0])
    return ctx.transpose(ctx.tensor(node.args[0]), [integer(axis) % count for axis in listed(node.args[1])])


def _transpose(ctx: Context, node: fx.Node) -> Value:
    axes = list(range(rank(node.args[0])))
    if node.target is aten.t.default:
        axes.reverse()
    else:
        first, second = (integer(axis) % len(axes) for axis in node.args[1:3])
        axes[first], axes[second] = axes[second], axes[first]
    return ctx.transpose(ctx.tensor(node.args[0]), axes)


def _expand(ctx: Context, node: fx.Node) -> Value:
    return ctx.expand(ctx.tensor(node.args[0]), tuple(node.meta["val"].shape))


def _slice(ctx: Context, node: fx.Node) -> Value:
    # Typed as Any: with every kind of argument that fx allows, the overloads of `slice` take mypy minutes.
    arguments: list[Any] = [*node.args, *(None,) * 5]
    source, axis, start, stop, step = arguments[:5]
    value = ctx.tensor(source)
    place = integer(axis or 0) % value.rank
    size = value.shape[place]
    first, last, stride = slice(start, min(stop, END) if stop is not None else None, step).indices(size)
    if stride == 1:
        return ctx.slice(value, place, first, max(last - first, 0))
    begin, end, strides = [0] * value.rank, list(value.shape), [1] * value.rank
    begin[place], end[place], strides[place] = first, last, stride
    shape = list(value.shape)
    shape[place] = len(range(first, last, stride))
    return ctx.op("STRIDED_SLICE", value, ctx.ints(*begin), ctx.ints(*end), ctx.ints(*strides), shape=shape)


def _select(ctx: Context, node: fx.Node) -> Value:
    source, axis, index = node.args[:3]
    value = ctx.tensor(source)
    place = integer(axis) % value.rank
    row = ctx.slice(value, place, integer(index) % value.shape[place], 1)
    return ctx.reshape(row, tuple(node.meta["val"].shape))


def _concat(ctx: Context, node: fx.Node) -> Value:
    axis = integer(node.args[1]) if len(node.args) > 1 else 0
    parts = [ctx.tensor(item, result_dtype(node)) for item in listed(node.args[0])]
    return ctx.concat([part for part in parts if 0 not in part.shape] or parts[:1], axis % rank(node))


def _stack(ctx: Context, node: fx.Node) -> Value:
    axis = integer(node.args[1]) % rank(node) if len(node.args) > 1 else 0
    parts = [ctx.tensor(item, result_dtype(node)) for item in listed(node.args[0])]
    shape = (*parts[0].shape[:axis], 1, *parts[0].shape[axis:])
    return ctx.concat([ctx.reshape(part, shape) for part in parts], axis)


def _split(ctx: Context, node: fx.Node) -> Sequence[Value]:
    value = ctx.tensor(node.args[0])
    axis = (integer(node.args[2]) if len(node.args) > 2 else 0) % value.rank
    return split(ctx, value, [int(part.shape[axis]) for part in node.meta["val"]], axis)


def split(ctx: Context, value: Value, sizes: Sequence[int], axis: int) -> Sequence[Value]:
    """Cut an axis into pieces: SPLIT where they are alike, which XNNPACK takes as well."""
    shapes = [[*value.shape[:axis], size, *value.shape[axis + 1 :]] for size in sizes]
    outputs = [(shape, value.dtype) for shape in shapes]
    place = ctx.constant(np.int32(axis), torch.int32)
    if len(set(sizes)) == 1:
        return ctx.graph.op("SPLIT", [place, value], outputs, {"numSplits": len(sizes)})
    return ctx.graph.op("SPLIT_V", [value, ctx.ints(*sizes), place], outputs, {"numSplits": len(sizes)})


def _unbind(ctx: Context, node: fx.Node) -> Sequence[Value]:
    value = ctx.tensor(node.args[0])
    axis = integer(node.args[1]) % value.rank if len(node.args) > 1 else 0
    shape = (*value.shape[:axis], *value.shape[axis + 1 :])
    outputs = [(shape, value.dtype)] * value.shape[axis]
    return ctx.graph.op("UNPACK", [value], outputs, {"num": value.shape[axis], "axis": axis})


def _getitem(ctx: Context, node: fx.Node) -> Any:
    source, index = node.args
    return ctx.get(source)[index]


def _slice_scatter(ctx: Context, node: fx.Node) -> Value:
    arguments: list[Any] = [*node.args, *(None,) * 6]
    target, source, axis, start, stop, step = arguments[:6]
    if step not in (None, 1):
        raise ctx.refuse(node, "writing to every n-th slice has no form")
    whole, value = ctx.tensor(target), ctx.tensor(source, result_dtype(node))
    place = integer(axis or 0) % whole.rank
    size = whole.shape[place]
    first, last, _ = slice(start, min(stop, END) if stop is not None else None).indices(size)
    parts = [
        *([ctx.slice(whole, place, 0, first)] if first else []),
        value,
        *([ctx.slice(whole, place, last, size - last)] if last < size else []),
    ]
    return ctx.concat(parts, place)


def _copy(ctx: Context, node: fx.Node) -> Value:
    return ctx.expand(ctx.tensor(node.args[1], result_dtype(node)), shape_of(node.args[0]))


def _repeat_interleave(ctx: Context, node: fx.Node) -> Value:
    value, times = ctx.tensor(node.args[0]), integer(node.args[1])
    axis = integer(node.args[2]) % value.rank
    column = ctx.reshape(value, (*value.shape[: axis + 1], 1, *value.shape[axis + 1 :]))
    wide = ctx.expand(column, (*value.shape[: axis + 1], times, *value.shape[axis + 1 :]))
    return ctx.reshape(wide, tuple(node.meta["val"].shape))


def _index(ctx: Context, node: fx.Node) -> Value:
    source, indices = node.args
    used = [(axis, index) for axis, index in enumerate(listed(indices)) if index is not None]
    if len(used) != 1:
        raise ctx.refuse(node, "indexing by several tensors has no form")
    axis, index = used[0]
    if node_of(index).meta["val"].dtype is torch.bool:
        raise ctx.refuse(node, "indexing by a mask has a result of unknown size")
    return gather(ctx, ctx.tensor(source), ctx.tensor(index, torch.int64), axis)


def gather(ctx: Context, value: Value, index: Value, axis: int) -> Value:
    """`value` at `index` along `axis`."""
    shape = (*value.shape[:axis], *index.shape, *value.shape[axis + 1 :])
    return ctx.op("GATHER", value, index, shape=shape, axis=axis)


def _index_select(ctx: Context, node: fx.Node) -> Value:
    value = ctx.tensor(node.args[0])
    return gather(ctx, value, ctx.tensor(node.args[2], torch.int64), integer(node.args[1]) % value.rank)


def _gather(ctx: Context, node: fx.Node) -> Value:
    """Torch's gather, where all axes before the last are those of the index: a GATHER with batch axes."""
    source, axis, index = node.args[:3]
    value, places = ctx.tensor(source), ctx.tensor(index, torch.int64)
    last = value.rank - 1
    if integer(axis) % value.rank != last or value.shape[:last] != places.shape[:last]:
        raise ctx.refuse(node, "gather along another axis than the last has no form")
    return ctx.op("GATHER", value, places, shape=places.shape, axis=last, batchDims=last)


def one_hot(ctx: Context, index: Value, depth: int) -> Value:
    """[..., k] indices -> [..., k, depth] bool."""
    line = ctx.constant(np.arange(depth).reshape((1,) * index.rank + (depth,)), torch.int32)
    return ctx.op("EQUAL", ctx.reshape(index, (*index.shape, 1)), line, dtype="BOOL")


def _scatter(ctx: Context, node: fx.Node) -> Value:
    """Torch's scatter along the last axis, for indices that are distinct within a row, as those of top-k are."""
    source, axis, index, updates = node.args[:4]
    dtype = result_dtype(node)
    target, places = ctx.tensor(source, dtype), ctx.tensor(index, torch.int64)
    last = target.rank - 1
    if integer(axis) % target.rank != last or target.shape[:last] != places.shape[:last]:
        raise ctx.refuse(node, "scatter along another axis than the last has no form")
    hot = one_hot(ctx, places, target.shape[last])
    hit = ctx.reduce("REDUCE_ANY", hot, [last], keep=False)
    if not isinstance(updates, fx.Node):
        return choose(ctx, hit, ctx.tensor(updates, dtype), target)
    values = ctx.cast(ctx.tensor(updates, dtype), "FLOAT32")
    column = ctx.reshape(values, (*values.shape, 1))
    spread = ctx.reduce("SUM", choose(ctx, hot, column, ctx.scalar(0.0)), [last], keep=False)
    return choose(ctx, hit, ctx.cast(spread, target.dtype), target)


def _full(ctx: Context, node: fx.Node) -> torch.Tensor:  # noqa: ARG001 -- every lowering takes both
    """Sizes are constant, and so is what is filled."""
    fake = node.meta["val"]
    fills = {
        aten.zeros.default: 0,
        aten.ones.default: 1,
        aten.new_zeros.default: 0,
        aten.new_ones.default: 1,
        aten.new_empty.default: 0,
        aten.empty.memory_format: 0,
    }
    fill = fills[node.target] if node.target in fills else node.args[1]
    return torch.full(tuple(fake.shape), fill, dtype=fake.dtype)  # type: ignore[arg-type]


def _repeat(ctx: Context, node: fx.Node) -> Value:
    value, times = ctx.tensor(node.args[0]), [integer(item) for item in listed(node.args[1])]
    padded = ctx.reshape(value, (*(1,) * (len(times) - value.rank), *value.shape))
    shape = [size * count for size, count in zip(padded.shape, times, strict=True)]
    return padded if tuple(shape) == padded.shape else ctx.op("TILE", padded, ctx.ints(*times), shape=shape)


def _pad(ctx: Context, node: fx.Node) -> Value:
    value, pads = ctx.tensor(node.args[0], result_dtype(node)), [integer(pad) for pad in listed(node.args[1])]
    if node.target is aten.pad.default and len(node.args) > 2 and node.args[2] != "constant":
        raise ctx.refuse(node, f"padding of kind {node.args[2]} has no form")
    fill = node.args[-1] if len(node.args) > 2 and isinstance(node.args[-1], int | float) else 0
    pairs = [(0, 0)] * (value.rank - len(pads) // 2) + list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    if any(pad < 0 for pair in pairs for pad in pair):
        raise ctx.refuse(node, "negative padding has no form")
    shape = [size + sum(pair) for size, pair in zip(value.shape, pairs, strict=True)]
    places = ctx.constant(np.asarray(pairs), torch.int32)
    return ctx.op("PADV2", value, places, ctx.tensor(fill, result_dtype(node)), shape=shape)


TABLE: Mapping[Any, Lowering] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _concat,
    aten.concat.default: _concat,
    aten.slice_scatter.default: _slice_scatter,
    aten.copy.default: _copy,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.stack.default: _stack,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: lambda ctx, node: split(
        ctx,
        ctx.tensor(node.args[0]),
        [int(part.shape[_chunk_axis(node)]) for part in node.meta["val"]],
        _chunk_axis(node),
    ),
    aten.unbind.int: _unbind,
    operator.getitem: _getitem,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.full.default: _full,
    aten.zeros.default: _full,
    aten.ones.default: _full,
    aten.new_empty.default: _full,
    aten.empty.memory_format: _full,
    aten.new_zeros.default: _full,
    aten.new_ones.default: _full,
    aten.repeat.default: _repeat,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
}


def _chunk_axis(node: fx.Node) -> int:
    return (integer(node.args[2]) if len(node.args) > 2 else 0) % rank(node.args[0])
