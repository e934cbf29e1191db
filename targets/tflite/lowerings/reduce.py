"""Reductions, sorting and cumulative ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.tflite.context import Context, integer, rank, result_dtype
from moec.targets.tflite.lowerings.elementwise import Lowering
from moec.targets.tflite.model import Value

aten = torch.ops.aten


def _axes(node: fx.Node) -> list[int]:
    count = rank(node.args[0])
    given = node.args[1] if len(node.args) > 1 and node.args[1] is not None else range(count)
    wanted = given if isinstance(given, list | tuple | range) else [given]
    return [integer(axis) % count for axis in wanted] or list(range(count))


def _keep(node: fx.Node) -> bool:
    return bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))


def _reduce(name: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Value:
        return ctx.reduce(name, ctx.tensor(node.args[0], result_dtype(node)), _axes(node), keep=_keep(node))

    return lower


def _arg(name: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Value:
        if len(node.args) < 2 or node.args[1] is None:
            raise ctx.refuse(node, "the position in the flattened tensor has no form")
        return _position(ctx, name, ctx.tensor(node.args[0]), _axes(node)[0], _keep(node))

    return lower


def _position(ctx: Context, name: str, value: Value, axis: int, keep: bool) -> Value:
    from moec.targets.tflite.library import schema

    shape = (*value.shape[:axis], *value.shape[axis + 1 :])
    kept = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
    place = ctx.constant(np.int32(axis), torch.int32)
    index = ctx.op(name, value, place, shape=shape, dtype="INT32", outputType=schema().TensorType.INT32)
    return ctx.reshape(index, kept) if keep else index


def _max_dim(ctx: Context, node: fx.Node) -> Sequence[Value]:
    value, axes, keep = ctx.tensor(node.args[0]), _axes(node), _keep(node)
    return ctx.reduce("REDUCE_MAX", value, axes, keep=keep), _position(ctx, "ARG_MAX", value, axes[0], keep)


def _last_axis(ctx: Context, value: Value, axis: int, call: Any) -> Any:
    """`call` on `value` with `axis` moved to the end, for operators that know the last axis alone."""
    place = axis % value.rank
    if place == value.rank - 1:
        return call(value)
    order = [*(other for other in range(value.rank) if other != place), place]
    back = [order.index(other) for other in range(value.rank)]
    results = call(ctx.transpose(value, order))
    if isinstance(results, Value):
        return ctx.transpose(results, back)
    return [ctx.transpose(result, back) for result in results]


def _softmax(ctx: Context, node: fx.Node) -> Value:
    value = ctx.tensor(node.args[0], result_dtype(node))
    made: Value = _last_axis(ctx, value, integer(node.args[1]), lambda x: ctx.op("SOFTMAX", x, beta=1.0))
    return made


def _log_softmax(ctx: Context, node: fx.Node) -> Value:
    value = ctx.tensor(node.args[0], result_dtype(node))
    made: Value = _last_axis(ctx, value, integer(node.args[1]), lambda x: ctx.op("LOG_SOFTMAX", x))
    return made


def _largest(ctx: Context, value: Value, count: int) -> list[Value]:
    shape = (*value.shape[:-1], count)
    number = ctx.constant(np.int32(count), torch.int32)
    return ctx.graph.op("TOPK_V2", [value, number], [(shape, value.dtype), (shape, "INT32")])


def _top(ctx: Context, value: Value, count: int, *, largest: bool) -> list[Value]:
    if largest:
        return _largest(ctx, value, count)
    values, indices = _largest(ctx, ctx.op("NEG", value), count)
    return [ctx.op("NEG", values), indices]


def _topk(ctx: Context, node: fx.Node) -> Sequence[Value]:
    source, count, axis, largest = [*node.args, *(-1, True)[len(node.args) - 2 :]][:4]
    made: Sequence[Value] = _last_axis(
        ctx, ctx.tensor(source), integer(axis), lambda x: _top(ctx, x, integer(count), largest=bool(largest))
    )
    return made


def _sort(ctx: Context, node: fx.Node) -> Sequence[Value]:
    source, axis, descending = [*node.args, *(-1, False)[len(node.args) - 1 :]][:3]
    value = ctx.tensor(source)
    count = value.shape[integer(axis)]
    made: Sequence[Value] = _last_axis(
        ctx, value, integer(axis), lambda x: _top(ctx, x, count, largest=bool(descending))
    )
    return made


def _cumsum(ctx: Context, node: fx.Node) -> Value:
    value = ctx.tensor(node.args[0], result_dtype(node))
    place = ctx.constant(np.int32(integer(node.args[1]) % value.rank), torch.int32)
    return ctx.op("CUMSUM", value, place, shape=value.shape, exclusive=False, reverse=False)


def _vector_norm(ctx: Context, node: fx.Node) -> Value:
    order = node.args[1] if len(node.args) > 1 else 2
    axes = node.args[2] if len(node.args) > 2 else [-1]
    keep = bool(node.args[3]) if len(node.args) > 3 else False
    value = ctx.tensor(node.args[0])
    wanted = [integer(axis) % value.rank for axis in (axes if isinstance(axes, list | tuple) else [axes])]
    if order == 1:
        return ctx.reduce("SUM", ctx.op("ABS", value), wanted, keep=keep)
    if order != 2:
        raise ctx.refuse(node, f"a norm of order {order} has no form")
    return ctx.op("SQRT", ctx.reduce("SUM", ctx.op("MUL", value, value), wanted, keep=keep))


TABLE: Mapping[Any, Lowering] = {
    aten.sum.dim_IntList: _reduce("SUM"),
    aten.sum.default: _reduce("SUM"),
    aten.mean.dim: _reduce("MEAN"),
    aten.mean.default: _reduce("MEAN"),
    aten.amax.default: _reduce("REDUCE_MAX"),
    aten.amin.default: _reduce("REDUCE_MIN"),
    aten.any.dim: _reduce("REDUCE_ANY"),
    aten.all.dim: _reduce("REDUCE_ALL"),
    aten.argmax.default: _arg("ARG_MAX"),
    aten.argmin.default: _arg("ARG_MIN"),
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
