"""Ops that move, cut, join and make tensors."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.quantize.lazy import Quantized
from moec.targets.onnx.context import Context, Lowering, integer, listed, np_dtype, rank, result_dtype
from moec.targets.onnx.lowerings import quantized

aten = torch.ops.aten
END = sys.maxsize


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def reshape_target(source: Sequence[Any], target: Sequence[Any]) -> list[int] | None:
    """A constant shape for Reshape, or None where it takes arithmetic.

    0 copies a size from the same place of the input, and one size may be left to be found as -1.
    """
    out: list[int] = []
    unknown = 0
    for position, size in enumerate(target):
        if isinstance(size, int):
            out.append(size)
        elif position < len(source) and str(source[position]) == str(size):
            out.append(0)
        else:
            out.append(-1)
            unknown += 1
    return out if unknown <= 1 else None


def _reshape(ctx: Context, node: fx.Node) -> ir.Value:
    source = _source(node)
    value = ctx.tensor(source)
    fixed = reshape_target(source.meta["val"].shape, node.meta["val"].shape)
    if fixed is not None:
        return ctx.op("Reshape", value, ctx.ints(*fixed))
    sizes = node.args[1]
    assert isinstance(sizes, list | tuple)
    return ctx.op("Reshape", value, ctx.dims(sizes))


def _permute(ctx: Context, node: fx.Node) -> ir.Value:
    source, axes = _source(node), listed(node.args[1])
    return ctx.op("Transpose", ctx.tensor(source), perm=[integer(axis) % rank(source) for axis in axes])


def _transpose(ctx: Context, node: fx.Node) -> ir.Value:
    source = _source(node)
    perm = list(range(rank(source)))
    if node.target is aten.t.default:
        perm.reverse()
    else:
        first, second = (integer(axis) % rank(source) for axis in node.args[1:3])
        perm[first], perm[second] = perm[second], perm[first]
    return ctx.op("Transpose", ctx.tensor(source), perm=perm)


def _unsqueeze(ctx: Context, node: fx.Node) -> ir.Value:
    axis = integer(node.args[1]) % rank(node)
    return ctx.op("Unsqueeze", ctx.tensor(node.args[0]), ctx.ints(axis))


def _squeeze(ctx: Context, node: fx.Node) -> ir.Value:
    source = _source(node)
    axes = node.args[1] if len(node.args) > 1 else [i for i, s in enumerate(source.meta["val"].shape) if s == 1]
    listed = axes if isinstance(axes, list | tuple) else [axes]
    wanted = [integer(axis) % rank(source) for axis in listed if source.meta["val"].shape[axis] == 1]
    if not wanted:
        return ctx.tensor(source)
    return ctx.op("Squeeze", ctx.tensor(source), ctx.ints(*wanted))


def _expand(ctx: Context, node: fx.Node) -> ir.Value:
    source, sizes = _source(node), listed(node.args[1])
    # ONNX Expand broadcasts, so 1 keeps a size, as -1 does in torch.
    old = [1] * (len(sizes) - rank(source)) + list(source.meta["val"].shape)
    wanted = [
        1 if size == -1 or str(new) == str(before) else size
        for size, before, new in zip(sizes, old, node.meta["val"].shape, strict=True)
    ]
    if all(size == 1 for size in wanted) and len(sizes) == rank(source):
        return ctx.tensor(source)
    return ctx.op("Expand", ctx.tensor(source), ctx.dims(wanted))


def _bound(ctx: Context, value: Any) -> ir.Value:
    return ctx.ints(min(value, END)) if isinstance(value, int) else ctx.dims([value])


def _slice(ctx: Context, node: fx.Node) -> ir.Value:
    source, axis, start, stop, step = [*node.args, *(None,) * 5][:5]
    assert isinstance(source, fx.Node)
    position = integer(axis or 0) % rank(source)
    return ctx.op(
        "Slice",
        ctx.tensor(source),
        _bound(ctx, start or 0),
        _bound(ctx, END if stop is None else stop),
        ctx.ints(position),
        ctx.ints(integer(step or 1)),
    )


def _select(ctx: Context, node: fx.Node) -> ir.Value:
    source, axis, index = node.args[:3]
    assert isinstance(source, fx.Node)
    return ctx.op("Gather", ctx.tensor(source), ctx.tensor(index), axis=integer(axis) % rank(source))


def _concat(ctx: Context, node: fx.Node) -> ir.Value:
    axis = integer(node.args[1]) if len(node.args) > 1 else 0
    parts = [ctx.tensor(item, result_dtype(node)) for item in listed(node.args[0])]
    return ctx.op("Concat", *parts, axis=axis % rank(node))


def _stack(ctx: Context, node: fx.Node) -> ir.Value:
    axis = integer(node.args[1]) % rank(node) if len(node.args) > 1 else 0
    parts = [ctx.op("Unsqueeze", ctx.tensor(item, result_dtype(node)), ctx.ints(axis)) for item in listed(node.args[0])]
    return ctx.op("Concat", *parts, axis=axis)


def _split(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    source = _source(node)
    axis = integer(node.args[2]) if len(node.args) > 2 else 0
    parts = node.meta["val"]
    sizes = [part.shape[axis] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        raise ctx.refuse(node, "a split into pieces of unknown size has no form")
    return ctx.ops("Split", ctx.tensor(source), ctx.ints(*sizes), outputs=len(sizes), axis=axis % rank(source))


def _getitem(ctx: Context, node: fx.Node) -> Any:
    source, index = node.args
    return ctx.get(source)[index]


def _slice_scatter(ctx: Context, node: fx.Node) -> ir.Value:
    target, source, axis, start, stop, step = [*node.args, *(None,) * 6][:6]
    assert isinstance(target, fx.Node)
    position = integer(axis or 0) % rank(target)
    length = target.meta["val"].shape[position]
    if step not in (None, 1) or not isinstance(length, int):
        raise ctx.refuse(node, "writing to every n-th slice, or along an axis of unknown size, has no form")
    first, last, _ = slice(start, stop).indices(length)
    whole, value = ctx.tensor(target), ctx.tensor(source, result_dtype(node))
    around = [(0, first), (last, length)]
    pieces = [
        ctx.op("Slice", whole, ctx.ints(low), ctx.ints(high), ctx.ints(position)) if low < high else None
        for low, high in around
    ]
    parts = [part for part in (pieces[0], value, pieces[1]) if part is not None]
    return parts[0] if len(parts) == 1 else ctx.op("Concat", *parts, axis=position)


def _copy(ctx: Context, node: fx.Node) -> ir.Value:
    target, source = node.args[:2]
    assert isinstance(target, fx.Node)
    assert isinstance(source, fx.Node)
    value = ctx.tensor(source, result_dtype(node))
    if [str(size) for size in source.meta["val"].shape] == [str(size) for size in target.meta["val"].shape]:
        return value
    return ctx.op("Expand", value, ctx.op("Shape", ctx.tensor(target)))


def _repeat_interleave(ctx: Context, node: fx.Node) -> ir.Value:
    source, times = _source(node), integer(node.args[1])
    axis = integer(node.args[2]) % rank(source)
    value = ctx.op("Unsqueeze", ctx.tensor(source), ctx.ints(axis + 1))
    ones = [1] * (rank(source) + 1)
    ones[axis + 1] = times
    repeated = ctx.op("Expand", value, ctx.ints(*ones))
    # Reshape's 0 copies a size of the repeated tensor, whose axes before `axis` are those of the source.
    before = [ctx.ints(*(0,) * axis, -1)]
    after = [ctx.op("Reshape", ctx.axis_length(source, place), ctx.ints(1)) for place in range(axis + 1, rank(source))]
    return ctx.op("Reshape", repeated, ctx.op("Concat", *before, *after, axis=0))


def _embedding(ctx: Context, node: fx.Node) -> ir.Value:
    table = node.args[0]
    if isinstance(table, fx.Node) and table.op == "get_attr":
        name = ctx.program.weights.resolve(str(table.target))
        own = ctx.program.weights[name]
        if isinstance(own, Quantized):
            return quantized.embedding(ctx, node, ctx.tensor(node.args[1]), name, own)
    return ctx.op("Gather", ctx.tensor(node.args[0]), ctx.tensor(node.args[1]), axis=0)


def _index_select(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Gather", ctx.tensor(node.args[0]), ctx.tensor(node.args[2]), axis=integer(node.args[1]))


def _index(ctx: Context, node: fx.Node) -> ir.Value:
    source, indices = node.args
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if len(used) != 1:
        raise ctx.refuse(node, "indexing by several tensors has no form")
    axis, index = used[0]
    return ctx.op("Gather", ctx.tensor(source), ctx.tensor(index), axis=axis)


def _gather(ctx: Context, node: fx.Node) -> ir.Value:
    source, axis, index = node.args[:3]
    assert isinstance(source, fx.Node)
    return ctx.op("GatherElements", ctx.tensor(source), ctx.tensor(index), axis=integer(axis) % rank(source))


def _scatter(ctx: Context, node: fx.Node) -> ir.Value:
    source, axis, index, updates = node.args[:4]
    assert isinstance(source, fx.Node)
    dtype = result_dtype(node)
    if isinstance(updates, fx.Node):
        values = ctx.tensor(updates, dtype)
    else:
        shape = ctx.op("Shape", ctx.tensor(index))
        values = ctx.op("Expand", ctx.tensor(updates, dtype), shape)
    return ctx.op(
        "ScatterElements",
        ctx.tensor(source, dtype),
        ctx.tensor(index),
        values,
        axis=integer(axis) % rank(source),
    )


def _full(ctx: Context, node: fx.Node) -> ir.Value:
    fills = {
        aten.zeros.default: 0,
        aten.ones.default: 1,
        aten.new_zeros.default: 0,
        aten.new_ones.default: 1,
        aten.new_empty.default: 0,
        aten.empty.memory_format: 0,
    }
    dtype = np_dtype(result_dtype(node))
    if node.target is aten.scalar_tensor.default:
        return ctx.constant(np.asarray(node.args[0], dtype=dtype))
    sizes = node.args[1] if isinstance(node.args[0], fx.Node) else node.args[0]
    fill = fills[node.target] if node.target in fills else node.args[1]
    if isinstance(fill, fx.Node):
        return ctx.op("Expand", ctx.tensor(fill, result_dtype(node)), ctx.dims(listed(sizes)))
    value = ir.Tensor(np.asarray([fill], dtype=dtype))
    return ctx.op("ConstantOfShape", ctx.dims(listed(sizes)), value=value)


def _arange(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    bounds = list(node.args)
    if len(bounds) == 1:
        bounds = [0, *bounds]
    start, stop, step = [*bounds, 1][:3]
    return ctx.op("Range", *(ctx.tensor(bound, dtype) for bound in (start, stop, step)))


def _repeat(ctx: Context, node: fx.Node) -> ir.Value:
    source, times = node.args
    assert isinstance(source, fx.Node)
    value, extra = ctx.tensor(source), len(listed(times)) - rank(source)
    if extra:
        value = ctx.op("Unsqueeze", value, ctx.ints(*range(extra)))
    return ctx.op("Tile", value, ctx.dims(listed(times)))


def _pad(ctx: Context, node: fx.Node) -> ir.Value:
    source, pads = _source(node), [int(pad) for pad in node.args[1]]  # type: ignore[arg-type, union-attr]
    axes = len(pads) // 2
    begin, end = pads[::2][::-1], pads[1::2][::-1]
    fill = node.args[2] if len(node.args) > 2 else 0
    return ctx.op(
        "Pad",
        ctx.tensor(source),
        ctx.ints(*begin, *end),
        ctx.tensor(fill, result_dtype(node)),
        ctx.ints(*range(rank(source) - axes, rank(source))),
    )


TABLE: Mapping[Any, Lowering] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
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
    aten.chunk.default: _split,
    aten.unbind.int: lambda ctx, node: [
        ctx.op("Gather", ctx.tensor(node.args[0]), ctx.constant(np.int64(i)), axis=_unbind_axis(node))
        for i in range(len(node.meta["val"]))
    ],
    operator.getitem: _getitem,
    aten.embedding.default: _embedding,
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
    aten.scalar_tensor.default: _full,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.repeat.default: _repeat,
    aten.constant_pad_nd.default: _pad,
}


def _unbind_axis(node: fx.Node) -> int:
    source = _source(node)
    return integer(node.args[1]) % rank(source) if len(node.args) > 1 else 0
