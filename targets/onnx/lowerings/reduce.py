"""Reductions, sorting and cumulative ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.targets.onnx.context import Context, Lowering, integer, rank, result_dtype

aten = torch.ops.aten


def _axes(node: fx.Node) -> list[int]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    listed = node.args[1] if len(node.args) > 1 and node.args[1] is not None else range(rank(source))
    wanted = listed if isinstance(listed, list | tuple | range) else [listed]
    return [integer(axis) % rank(source) for axis in wanted]


def _reduce(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        value = ctx.tensor(node.args[0], result_dtype(node))
        return ctx.op(op_type, value, ctx.ints(*_axes(node)), keepdims=int(keep))

    return lower


def _reduce_bool(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        value = ctx.tensor(node.args[0], torch.int64)
        return ctx.op("Cast", ctx.op(op_type, value, ctx.ints(*_axes(node)), keepdims=int(keep)), to=9)

    return lower


def _arg(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        value = ctx.tensor(node.args[0])
        if len(node.args) < 2 or node.args[1] is None:
            return ctx.op(op_type, ctx.op("Reshape", value, ctx.ints(-1)), axis=0, keepdims=0)
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        return ctx.op(op_type, value, axis=_axes(node)[0], keepdims=int(keep))

    return lower


def _max_dim(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    keep = int(bool(node.args[2]) if len(node.args) > 2 else False)
    value, axes = ctx.tensor(node.args[0]), _axes(node)
    values = ctx.op("ReduceMax", value, ctx.ints(*axes), keepdims=keep)
    return values, ctx.op("ArgMax", value, axis=axes[0], keepdims=keep)


def _softmax(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Softmax", ctx.tensor(node.args[0], result_dtype(node)), axis=integer(node.args[1]))


def _log_softmax(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("LogSoftmax", ctx.tensor(node.args[0], result_dtype(node)), axis=integer(node.args[1]))


def _topk(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    source, count, axis, largest, ordered = [*node.args, *(-1, True, True)[len(node.args) - 2 :]][:5]
    return ctx.ops(
        "TopK",
        ctx.tensor(source),
        ctx.dims([count]),
        outputs=2,
        axis=integer(axis),
        largest=int(bool(largest)),
        sorted=int(bool(ordered)),
    )


def _sort(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    source, axis, descending = [*node.args, *(-1, False)[len(node.args) - 1 :]][:3]
    assert isinstance(source, fx.Node)
    length = ctx.axis_length(source, integer(axis))
    count = ctx.op("Reshape", length, ctx.ints(1))
    return ctx.ops(
        "TopK", ctx.tensor(source), count, outputs=2, axis=integer(axis), largest=int(bool(descending)), sorted=1
    )


def _cumsum(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("CumSum", ctx.tensor(node.args[0], result_dtype(node)), ctx.tensor(node.args[1], torch.int64))


def _vector_norm(ctx: Context, node: fx.Node) -> ir.Value:
    order = node.args[1] if len(node.args) > 1 else 2
    if order not in (1, 2):
        raise ctx.refuse(node, f"a norm of order {order} has no form")
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axes = node.args[2] if len(node.args) > 2 and node.args[2] is not None else list(range(rank(source)))
    keep = bool(node.args[3]) if len(node.args) > 3 else False
    wanted = axes if isinstance(axes, list | tuple) else [axes]
    op_type = "ReduceL1" if order == 1 else "ReduceL2"
    return ctx.op(op_type, ctx.tensor(source), ctx.ints(*(integer(a) for a in wanted)), keepdims=int(keep))


TABLE: Mapping[Any, Lowering] = {
    aten.sum.dim_IntList: _reduce("ReduceSum"),
    aten.sum.default: _reduce("ReduceSum"),
    aten.mean.dim: _reduce("ReduceMean"),
    aten.mean.default: _reduce("ReduceMean"),
    aten.amax.default: _reduce("ReduceMax"),
    aten.amin.default: _reduce("ReduceMin"),
    aten.any.dim: _reduce_bool("ReduceMax"),
    aten.all.dim: _reduce_bool("ReduceMin"),
    aten.argmax.default: _arg("ArgMax"),
    aten.argmin.default: _arg("ArgMin"),
    aten.max.dim: _max_dim,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.cumsum.default: _cumsum,
    aten.norm.ScalarOpt_dim: _vector_norm,
    aten.linalg_vector_norm.default: _vector_norm,
}
