"""Ops that reshape, index and create tensors; those common to all targets are in `moec.targets.common.lowerings`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.quantize.lazy import Quantized
from moec.targets.common.arguments import expansion, integer, listed, rank, result_dtype
from moec.targets.onnx.context import Context, Lowering, np_dtype
from moec.targets.onnx.lowerings import quantized_embedding

aten = torch.ops.aten
END = sys.maxsize


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def reshape_target(source: Sequence[Any], target: Sequence[Any]) -> list[int] | None:
    """A constant shape for ONNX Reshape, or None where the shape must be computed at run time.

    In it, 0 copies the size of the same axis of the input, and one size may be -1, which Reshape infers.
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


def _before_reshape(value: ir.Value) -> ir.Value | None:
    """The input of the Reshape that made `value`, or None."""
    made = value.producer()
    return made.inputs[0] if made is not None and made.op_type == "Reshape" else None


def _reshape(ctx: Context, node: fx.Node) -> ir.Value:
    source = _source(node)
    value = ctx.tensor(source)
    undone = _before_reshape(value)
    if undone is not None and undone.shape == ctx.traced_shape(node):
        return undone  # as after attention, which joins its heads
    fixed = reshape_target(source.meta["val"].shape, node.meta["val"].shape)
    if fixed is not None:
        return ctx.op("Reshape", value, ctx.ints(*fixed))
    sizes = node.args[1]
    assert isinstance(sizes, list | tuple)
    return ctx.op("Reshape", value, ctx.dims(sizes))


def _expand(ctx: Context, node: fx.Node) -> ir.Value:
    # ONNX Expand broadcasts: 1 keeps the size of an axis.
    source, wanted = _source(node), expansion(node)
    if all(size == 1 for size in wanted) and len(wanted) == rank(source):
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


def _embedding(ctx: Context, node: fx.Node) -> ir.Value:
    table = node.args[0]
    if isinstance(table, fx.Node) and table.op == "get_attr":
        name = ctx.program.weights.resolve(str(table.target))
        own = ctx.program.weights[name]
        if isinstance(own, Quantized):
            return quantized_embedding.embedding(ctx, node, ctx.tensor(node.args[1]), name, own)
        halved = ctx.stored_half(name) and node.meta["val"].dtype is torch.float32
        stored = f"{name}.fp16" if halved else name
        ctx.others[name] = {"initializer": stored, "transposed": False}
    return ctx.op("Gather", ctx.tensor(node.args[0]), ctx.tensor(node.args[1]), axis=0)


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
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.embedding.default: _embedding,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.full.default: _full,
    aten.arange.start_step: _arange,
    aten.constant_pad_nd.default: _pad,
}
