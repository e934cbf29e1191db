"""Reductions, argmax, softmax, top-k and cumulative sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import integer, listed
from moec.targets.tflite.context import Context
from moec.targets.tflite.library import schema
from moec.targets.tflite.lowerings.elementwise import Lowering
from moec.targets.tflite.model import Value

aten = torch.ops.aten


def _reduce(name: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Value:
        source, axes, keep = node.args
        return ctx.reduce(name, ctx.tensor(source), listed(axes), keep=bool(keep))

    return lower


def _argmax(ctx: Context, node: fx.Node) -> Value:
    source, axis, keep = node.args
    value, place = ctx.tensor(source), integer(axis)
    shape = (*value.shape[:place], *value.shape[place + 1 :])
    kind = schema().TensorType.INT32
    where = ctx.constant(np.int32(place), torch.int32)
    index = ctx.op("ARG_MAX", value, where, shape=shape, dtype="INT32", outputType=kind)
    return ctx.reshape(index, (*value.shape[:place], 1, *value.shape[place + 1 :])) if keep else index


def _last_axis(ctx: Context, value: Value, axis: int, call: Any) -> Any:
    """Apply `call` to `value` with `axis` moved to the end, for operators that work on the last axis only."""
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
    value, axis = ctx.tensor(node.args[0]), integer(node.args[1])
    made: Value = _last_axis(ctx, value, axis, lambda x: ctx.op("SOFTMAX", x, beta=1.0))
    return made


def largest(ctx: Context, value: Value, count: int) -> list[Value]:
    """Values and int32 indices of the `count` largest along the last axis, the largest first."""
    shape = (*value.shape[:-1], count)
    number = ctx.constant(np.int32(count), torch.int32)
    return ctx.graph.op("TOPK_V2", [value, number], [(shape, value.dtype), (shape, "INT32")])


def _top(ctx: Context, value: Value, count: int, *, of_largest: bool) -> list[Value]:
    if of_largest:
        return largest(ctx, value, count)
    values, indices = largest(ctx, ctx.op("NEG", value), count)
    return [ctx.op("NEG", values), indices]


def _topk(ctx: Context, node: fx.Node) -> Sequence[Value]:
    source, count, axis, of_largest, _sorted = node.args
    made: Sequence[Value] = _last_axis(
        ctx, ctx.tensor(source), integer(axis), lambda x: _top(ctx, x, integer(count), of_largest=bool(of_largest))
    )
    return made


def _cumsum(ctx: Context, node: fx.Node) -> Value:
    value = ctx.tensor(node.args[0])
    place = ctx.constant(np.int32(integer(node.args[1])), torch.int32)
    return ctx.op("CUMSUM", value, place, shape=value.shape, exclusive=False, reverse=False)


TABLE: Mapping[Any, Lowering] = {
    aten.sum.dim_IntList: _reduce("SUM"),
    aten.mean.dim: _reduce("MEAN"),
    aten.amax.default: _reduce("REDUCE_MAX"),
    aten.amin.default: _reduce("REDUCE_MIN"),
    aten.argmax.default: _argmax,
    aten._softmax.default: _softmax,
    aten.topk.default: _topk,
    aten.cumsum.default: _cumsum,
}
