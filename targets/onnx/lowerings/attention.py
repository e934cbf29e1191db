"""`moec::attention`: the standard op of opset 24, or elementary ops where that has no form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.program import ATTENTION
from moec.targets.onnx.context import DTYPES, Context, Lowering, integer, np_dtype, real, result_dtype
from moec.targets.onnx.lowerings.group_query import group_query_attention


def _attention(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    query, key, value, past_key, past_value, _position, _mask, sinks, scale, _kind, _window, softcap = node.args
    mask = visible(ctx, node)
    if ctx.dialect.shared_buffer:
        return group_query_attention(ctx, node, mask)
    if sinks is not None:
        return decomposed(ctx, node, mask)
    out, present_key, present_value = ctx.ops(
        "Attention",
        *(ctx.tensor(argument) for argument in (query, key, value)),
        mask,
        ctx.tensor(past_key),
        ctx.tensor(past_value),
        outputs=3,
        scale=real(scale),
        softcap=real(softcap),
    )
    return ctx.op("Transpose", out, perm=[0, 2, 1, 3]), present_key, present_value


def visible(ctx: Context, node: fx.Node) -> ir.Value:
    """The mask [B, 1, S, T] bool of `moec.compiler.ir.ops.visible`, made once for all layers that share it."""
    position, mask, kind, window = node.args[5], node.args[6], node.args[9], node.args[10]
    assert isinstance(position, fx.Node)

    def make() -> ir.Value:
        slots, query = _slots_and_query(ctx, node)
        allowed = ctx.op("LessOrEqual", slots, query)
        if kind == "sliding":
            low = ctx.op("Sub", query, ctx.constant(np.int64(integer(window))))
            allowed = ctx.op("And", allowed, ctx.op("Greater", slots, low))
        if kind == "chunked":
            allowed = ctx.op("And", allowed, _same_chunk(ctx, node, slots, query))
        if mask is not None:
            kept = ctx.op("Unsqueeze", ctx.tensor(mask, torch.bool), ctx.ints(1, 2))
            allowed = ctx.op("And", allowed, kept)
        return allowed

    return ctx.shared(("visible", position, mask, kind, window), make)


def _slots_and_query(ctx: Context, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    """Slots [1, 1, 1, T] and the slot of each query [1, 1, S, 1]."""
    position = node.args[5]

    def total_length() -> ir.Value:
        return ctx.op("Add", ctx.axis_length(_node(node.args[3]), 2), ctx.axis_length(_node(node.args[1]), 2))

    def slots() -> ir.Value:
        total = ctx.shared("total length", total_length)
        line = ctx.op("Range", ctx.constant(np.int64(0)), total, ctx.constant(np.int64(1)))
        return ctx.op("Unsqueeze", line, ctx.ints(0, 1, 2))

    def query() -> ir.Value:
        return ctx.op("Unsqueeze", ctx.tensor(position), ctx.ints(0, 1, 3))

    return ctx.shared("slots", slots), ctx.shared(("query slots", position), query)


def _same_chunk(ctx: Context, node: fx.Node, slots: ir.Value, query: ir.Value) -> ir.Value:
    mask, window = node.args[6], ctx.constant(np.int64(integer(node.args[10])))
    if mask is not None:

        def padding() -> ir.Value:
            seen = ctx.op("CumSum", ctx.tensor(mask, torch.int64), ctx.constant(np.int64(1)))
            before = ctx.op("Cast", ctx.op("Equal", seen, ctx.constant(np.int64(0))), to=int(ir.DataType.INT64))
            return ctx.op("Unsqueeze", ctx.op("ReduceSum", before, ctx.ints(1), keepdims=1), ctx.ints(1, 2))

        left = ctx.shared(("left padding", mask), padding)
        slots, query = (ctx.op("Sub", value, left) for value in (slots, query))
        # A padding slot lies before its sequence: its negative chunk is cut off by the padding mask anyway.
        slots, query = (ctx.op("Max", value, ctx.constant(np.int64(0))) for value in (slots, query))
    return ctx.op("Equal", ctx.op("Div", slots, window), ctx.op("Div", query, window))


def decomposed(ctx: Context, node: fx.Node, mask: ir.Value, *, wide: bool = False) -> Sequence[ir.Value]:
    """Attention in elementary ops; with sinks its softmax has one more column per head (gpt-oss).

    Args:
        ctx: The context.
        node: The attention node.
        mask: [B, 1, S, T] bool, see `visible`.
        wide: Whether the softmax is computed in float32, as in the reference, whatever the graph computes in.
    """
    query, key, value, past_key, past_value = (ctx.tensor(argument) for argument in node.args[:5])
    own = result_dtype(_node(node.args[0]))
    dtype = torch.float32 if wide else own
    heads, depth = (int(_node(node.args[0]).meta["val"].shape[axis]) for axis in (1, 3))
    groups = int(_node(node.args[1]).meta["val"].shape[1])
    keys = ctx.op("Concat", past_key, key, axis=2)
    values = ctx.op("Concat", past_value, value, axis=2)
    # [B, Hkv, G, S, D] against [B, Hkv, 1, D, T]: grouped heads without a copy of the keys.
    grouped = ctx.op("Reshape", query, ctx.ints(0, groups, heads // groups, -1, depth))
    turned = ctx.op("Transpose", ctx.op("Unsqueeze", keys, ctx.ints(2)), perm=[0, 1, 2, 4, 3])
    logits = _cast(ctx, ctx.op("MatMul", grouped, turned), own, dtype)
    probabilities = _cast(ctx, _softmax(ctx, node, logits, mask, dtype), dtype, own)
    mixed = ctx.op("MatMul", probabilities, ctx.op("Unsqueeze", values, ctx.ints(2)))
    width = int(_node(node.args[2]).meta["val"].shape[3])
    joined = ctx.op("Reshape", mixed, ctx.ints(0, heads, -1, width))
    return ctx.op("Transpose", joined, perm=[0, 2, 1, 3]), keys, values


def _softmax(ctx: Context, node: fx.Node, logits: ir.Value, mask: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Softmax of logits [B, Hkv, G, S, T] in `dtype`, scaled, capped and masked."""
    sinks, scale, softcap = node.args[7], real(node.args[8]), real(node.args[11])

    def constant(value: float) -> ir.Value:
        return ctx.constant(np.asarray(value, np_dtype(dtype)))

    logits = ctx.op("Mul", logits, constant(scale))
    if softcap:
        logits = ctx.op("Mul", ctx.op("Tanh", ctx.op("Div", logits, constant(softcap))), constant(softcap))
    lowest = constant(torch.finfo(dtype).min)
    logits = ctx.op("Where", ctx.op("Unsqueeze", mask, ctx.ints(2)), logits, lowest)
    if sinks is None:
        return ctx.op("Softmax", logits, axis=-1)
    heads, groups = (int(_node(node.args[place]).meta["val"].shape[1]) for place in (0, 1))
    column = ctx.op("Reshape", ctx.tensor(sinks, dtype), ctx.ints(1, groups, heads // groups, 1, 1))
    first = ctx.op("Slice", logits, ctx.ints(0), ctx.ints(1), ctx.ints(4))
    column = ctx.op("Expand", column, ctx.op("Shape", first))
    probabilities = ctx.op("Softmax", ctx.op("Concat", logits, column, axis=4), axis=-1)
    return ctx.op("Slice", probabilities, ctx.ints(0), ctx.ints(-1), ctx.ints(4))


def _cast(ctx: Context, value: ir.Value, source: torch.dtype, dtype: torch.dtype) -> ir.Value:
    return value if source == dtype else ctx.op("Cast", value, to=int(DTYPES[dtype]))


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


TABLE: Mapping[Any, Lowering] = {ATTENTION: _attention}
