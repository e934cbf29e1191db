"""Ops that reshape and index tensors; those common to all targets are in `moec.targets.common.lowerings`.

Ops that create tensors from numbers need no lowering: they are computed as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import integer, listed, result_dtype
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.lowerings.elementwise import Lowering, choose
from moec.targets.tflite.model import Value

aten = torch.ops.aten


def _reshape(ctx: Context, node: fx.Node) -> Value:
    return ctx.reshape(ctx.tensor(node.args[0]), tuple(node.meta["val"].shape))


def _expand(ctx: Context, node: fx.Node) -> Value:
    return ctx.expand(ctx.tensor(node.args[0]), tuple(node.meta["val"].shape))


def _slice(ctx: Context, node: fx.Node) -> Value:
    # Typed as Any, since mypy takes minutes for the overloads of `slice` with fx's union of argument types.
    arguments: list[Any] = list(node.args)
    source, place, start, stop, step = arguments
    value = ctx.tensor(source)
    size = value.shape[place]
    first, last, stride = slice(start, stop, step).indices(size)
    if stride == 1:
        return ctx.slice(value, place, first, max(last - first, 0))
    begin, end, strides = [0] * value.rank, list(value.shape), [1] * value.rank
    begin[place], end[place], strides[place] = first, last, stride
    shape = list(value.shape)
    shape[place] = len(range(first, last, stride))
    return ctx.op("STRIDED_SLICE", value, ctx.ints(*begin), ctx.ints(*end), ctx.ints(*strides), shape=shape)


def _select(ctx: Context, node: fx.Node) -> Value:
    source, axis, index = node.args
    value, place = ctx.tensor(source), integer(axis)
    row = ctx.slice(value, place, integer(index) % value.shape[place], 1)
    return ctx.reshape(row, tuple(node.meta["val"].shape))


def _gather(ctx: Context, node: fx.Node) -> Value:
    """torch.gather along the last axis, as a GATHER whose batch axes are all others."""
    source, axis, index = node.args
    value, places = ctx.tensor(source), ctx.tensor(index, torch.int64)
    last = value.rank - 1
    if axis != last or value.shape[:last] != places.shape[:last]:
        raise refuse(node, "gather along an axis other than the last is not supported")
    return ctx.op("GATHER", value, places, shape=places.shape, axis=last, batchDims=last)


def one_hot(ctx: Context, index: Value, depth: int) -> Value:
    """Indices [..., k] -> one-hot [..., k, depth] bool."""
    line = ctx.constant(np.arange(depth).reshape((1,) * index.rank + (depth,)), torch.int32)
    return ctx.op("EQUAL", ctx.reshape(index, (*index.shape, 1)), line, dtype="BOOL")


def _scatter(ctx: Context, node: fx.Node) -> Value:
    """torch.scatter along the last axis, for indices that are distinct within a row, as those of top-k are."""
    source, axis, index, updates = node.args
    target, places = ctx.tensor(source), ctx.tensor(index, torch.int64)
    last = target.rank - 1
    if axis != last or target.shape[:last] != places.shape[:last]:
        raise refuse(node, "scatter along an axis other than the last is not supported")
    hot = one_hot(ctx, places, target.shape[last])
    hit = ctx.reduce("REDUCE_ANY", hot, [last], keep=False)
    values = ctx.cast(ctx.tensor(updates), "FLOAT32")
    column = ctx.reshape(values, (*values.shape, 1))
    spread = ctx.reduce("SUM", choose(ctx, hot, column, ctx.scalar(0.0)), [last], keep=False)
    return choose(ctx, hit, ctx.cast(spread, target.dtype), target)


def _pad(ctx: Context, node: fx.Node) -> Value:
    value, pads, fill = ctx.tensor(node.args[0]), [integer(pad) for pad in listed(node.args[1])], node.args[2]
    pairs = [(0, 0)] * (value.rank - len(pads) // 2) + list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    if any(pad < 0 for pair in pairs for pad in pair):
        raise refuse(node, "negative padding is not supported")
    shape = [size + sum(pair) for size, pair in zip(value.shape, pairs, strict=True)]
    places = ctx.constant(np.asarray(pairs), torch.int32)
    return ctx.op("PADV2", value, places, ctx.tensor(fill, result_dtype(node)), shape=shape)


TABLE: Mapping[Any, Lowering] = {
    aten.reshape.default: _reshape,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.constant_pad_nd.default: _pad,
}
