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
from moec.targets.common.arguments import integer, listed, rank, result_dtype
from moec.targets.common.refusals import refuse
from moec.targets.onnx.context import Context, Lowering, np_dtype
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
    return ctx.op("Transpose", ctx.tensor(node.args[0]), perm=listed(node.args[1]))


def _unsqueeze(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Unsqueeze", ctx.tensor(node.args[0]), ctx.ints(integer(node.args[1])))


def _squeeze(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Squeeze", ctx.tensor(node.args[0]), ctx.ints(*listed(node.args[1])))


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
    source, axis, start, stop, step = node.args
    bounds = (_bound(ctx, start), _bound(ctx, stop))
    return ctx.op("Slice", ctx.tensor(source), *bounds, ctx.ints(integer(axis)), ctx.ints(integer(step)))


def _select(ctx: Context, node: fx.Node) -> ir.Value:
    source, axis, index = node.args
    return ctx.op("Gather", ctx.tensor(source), ctx.tensor(index), axis=integer(axis))


def _concat(ctx: Context, node: fx.Node) -> ir.Value:
    parts, axis = node.args
    return ctx.op("Concat", *(ctx.tensor(item) for item in listed(parts)), axis=integer(axis))


def _split(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    source, sizes, axis = node.args
    wanted = listed(sizes)
    return ctx.ops("Split", ctx.tensor(source), ctx.ints(*wanted), outputs=len(wanted), axis=integer(axis))


def _getitem(ctx: Context, node: fx.Node) -> Any:
    source, index = node.args
    return ctx.get(source)[index]


def _embedding(ctx: Context, node: fx.Node) -> ir.Value:
    table = node.args[0]
    if isinstance(table, fx.Node) and table.op == "get_attr":
        name = ctx.program.weights.resolve(str(table.target))
        own = ctx.program.weights[name]
        if isinstance(own, Quantized):
            return quantized.embedding(ctx, node, ctx.tensor(node.args[1]), name, own)
    return ctx.op("Gather", ctx.tensor(node.args[0]), ctx.tensor(node.args[1]), axis=0)


def _index(ctx: Context, node: fx.Node) -> ir.Value:
    source, indices = node.args
    used = [(axis, index) for axis, index in enumerate(listed(indices)) if index is not None]
    if len(used) != 1:
        raise refuse(node, "indexing by several tensors has no form")
    ((axis, index),) = used
    return ctx.op("Gather", ctx.tensor(source), ctx.tensor(index), axis=axis)


def _gather(ctx: Context, node: fx.Node) -> ir.Value:
    source, axis, index = node.args
    return ctx.op("GatherElements", ctx.tensor(source), ctx.tensor(index), axis=integer(axis))


def _scatter(ctx: Context, node: fx.Node) -> ir.Value:
    source, axis, index, values = node.args
    operands = (ctx.tensor(item) for item in (source, index, values))
    return ctx.op("ScatterElements", *operands, axis=integer(axis))


def _full(ctx: Context, node: fx.Node) -> ir.Value:
    sizes, fill = node.args
    dtype = result_dtype(node)
    if isinstance(fill, fx.Node):
        return ctx.op("Expand", ctx.tensor(fill, dtype), ctx.dims(listed(sizes)))
    if not listed(sizes):
        return ctx.constant(np.asarray(fill, dtype=np_dtype(dtype)))
    value = ir.Tensor(np.asarray([fill], dtype=np_dtype(dtype)))
    return ctx.op("ConstantOfShape", ctx.dims(listed(sizes)), value=value)


def _arange(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Range", *(ctx.tensor(bound, result_dtype(node)) for bound in node.args))


def _repeat(ctx: Context, node: fx.Node) -> ir.Value:
    source, times = node.args
    assert isinstance(source, fx.Node)
    value, extra = ctx.tensor(source), len(listed(times)) - rank(source)
    if extra:
        value = ctx.op("Unsqueeze", value, ctx.ints(*range(extra)))
    return ctx.op("Tile", value, ctx.dims(listed(times)))


def _pad(ctx: Context, node: fx.Node) -> ir.Value:
    source, pads, fill = _source(node), listed(node.args[1]), node.args[2]
    axes = len(pads) // 2
    begin, end = pads[::2][::-1], pads[1::2][::-1]
    return ctx.op(
        "Pad",
        ctx.tensor(source),
        ctx.ints(*begin, *end),
        ctx.tensor(fill, result_dtype(node)),
        ctx.ints(*range(rank(source) - axes, rank(source))),
    )


TABLE: Mapping[Any, Lowering] = {
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _concat,
    aten.split_with_sizes.default: _split,
    operator.getitem: _getitem,
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.full.default: _full,
    aten.arange.start_step: _arange,
    aten.constant_pad_nd.default: _pad,
}
