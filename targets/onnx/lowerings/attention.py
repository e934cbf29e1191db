"""`moec::attention`: the Attention op of opset 24, or elementary ops where Attention does not apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.operands import Attention, Indexer
from moec.compiler.ir.program import ATTENTION
from moec.targets.common.arguments import result_dtype
from moec.targets.onnx.context import DTYPES, Context, Lowering, np_dtype
from moec.targets.onnx.lowerings.group_query import group_query_attention
from moec.targets.onnx.lowerings.heads import apart, side_by_side


def _attention(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    own, mask = Attention.of(node), attended(ctx, node)
    if ctx.dialect.shared_buffer:
        return group_query_attention(ctx, node, mask)
    if own.sinks is not None:
        return decomposed(ctx, node, mask)
    operands = [side_by_side(ctx, item) for item in (own.query, own.key, own.value)]
    flat, heads = None not in operands, own.query.meta["val"].shape[1]
    if not flat:
        operands = [ctx.tensor(item) for item in (own.query, own.key, own.value)]
    counts: dict[str, Any] = {}
    if flat:
        counts = {"q_num_heads": int(heads), "kv_num_heads": int(own.key.meta["val"].shape[1])}
    out, present_key, present_value = ctx.ops(
        "Attention",
        *operands,
        mask,
        ctx.tensor(own.past_key),
        ctx.tensor(own.past_value),
        outputs=3,
        scale=own.scale,
        softcap=own.softcap,
        **counts,
    )
    width = int(own.value.meta["val"].shape[3])
    out = apart(ctx, own.query, out, width) if flat else ctx.op("Transpose", out, perm=[0, 2, 1, 3])
    return out, present_key, present_value


def attended(ctx: Context, node: fx.Node) -> ir.Value:
    """The slots that an attention node attends to, [B, 1, S, T] bool: visible, and selected if it has an indexer."""
    own = Attention.of(node)
    if own.selected is None:
        return visible(ctx, own)
    return ctx.op("And", visible(ctx, own), ctx.op("Unsqueeze", ctx.tensor(own.selected), ctx.ints(1)))


def visible(ctx: Context, own: Attention | Indexer) -> ir.Value:
    """The mask [B, 1, S, T] bool of `moec.compiler.ir.ops.visible`, made once for all layers that share it."""
    mask, window = own.attention_mask, own.window

    def make() -> ir.Value:
        slots, query = _slots_and_query(ctx, own)
        allowed = ctx.op("LessOrEqual", slots, query)
        if own.kind == "sliding":
            low = ctx.op("Sub", query, ctx.constant(np.int64(window)))
            allowed = ctx.op("And", allowed, ctx.op("Greater", slots, low))
        if own.kind == "chunked":
            allowed = ctx.op("And", allowed, _same_chunk(ctx, own, slots, query))
        if mask is not None:
            kept = ctx.op("Unsqueeze", ctx.tensor(mask, torch.bool), ctx.ints(1, 2))
            allowed = ctx.op("And", allowed, kept)
        return allowed

    return ctx.shared(("visible", own.cache_position, mask, own.kind, window), make)


def _slots_and_query(ctx: Context, own: Attention | Indexer) -> tuple[ir.Value, ir.Value]:
    """Indices of the cache slots [1, 1, 1, T], and the slot of each query [1, 1, S, 1]."""
    position = own.cache_position

    def slots() -> ir.Value:
        total = total_length(ctx, own)
        line = ctx.op("Range", ctx.constant(np.int64(0)), total, ctx.constant(np.int64(1)))
        return ctx.op("Unsqueeze", line, ctx.ints(0, 1, 2))

    def query() -> ir.Value:
        return ctx.op("Unsqueeze", ctx.tensor(position), ctx.ints(0, 1, 3))

    return ctx.shared("slots", slots), ctx.shared(("query slots", position), query)


def total_length(ctx: Context, own: Attention | Indexer) -> ir.Value:
    """Number of tokens in the cache after the step, int64 without axes."""

    def make() -> ir.Value:
        return ctx.op("Add", ctx.axis_length(own.past_key, 2), ctx.axis_length(own.key, 2))

    return ctx.shared("total length", make)


def _same_chunk(ctx: Context, own: Attention | Indexer, slots: ir.Value, query: ir.Value) -> ir.Value:
    mask, window = own.attention_mask, ctx.constant(np.int64(own.window))
    if mask is not None:

        def padding() -> ir.Value:
            seen = ctx.op("CumSum", ctx.tensor(mask, torch.int64), ctx.constant(np.int64(1)))
            before = ctx.op("Cast", ctx.op("Equal", seen, ctx.constant(np.int64(0))), to=int(ir.DataType.INT64))
            return ctx.op("Unsqueeze", ctx.op("ReduceSum", before, ctx.ints(1), keepdims=1), ctx.ints(1, 2))

        left = ctx.shared(("left padding", mask), padding)
        slots, query = (ctx.op("Sub", value, left) for value in (slots, query))
        # Left padding has negative indices; clamping them to 0 is harmless, since the padding mask hides these slots.
        slots, query = (ctx.op("Max", value, ctx.constant(np.int64(0))) for value in (slots, query))
    return ctx.op("Equal", ctx.op("Div", slots, window), ctx.op("Div", query, window))


def decomposed(ctx: Context, node: fx.Node, mask: ir.Value, *, wide: bool = False) -> Sequence[ir.Value]:
    """Attention in elementary ops; with attention sinks the softmax has one more column per head (gpt-oss).

    Args:
        ctx: The context.
        node: The attention node.
        mask: [B, 1, S, T] bool, see `attended`.
        wide: Whether the softmax is computed in float32, as in the reference, rather than in the graph's dtype.
    """
    operands = Attention.of(node)
    own = result_dtype(operands.query)
    dtype = torch.float32 if wide else own
    heads, depth = (int(operands.query.meta["val"].shape[axis]) for axis in (1, 3))
    groups = int(operands.key.meta["val"].shape[1])
    query = ctx.tensor(operands.query)
    keys = ctx.op("Concat", ctx.tensor(operands.past_key), ctx.tensor(operands.key), axis=2)
    values = ctx.op("Concat", ctx.tensor(operands.past_value), ctx.tensor(operands.value), axis=2)
    # [B, Hkv, G, S, D] against [B, Hkv, 1, D, T]: grouped heads without a copy of the keys.
    grouped = ctx.op("Reshape", query, ctx.ints(0, groups, heads // groups, -1, depth))
    turned = ctx.op("Transpose", ctx.op("Unsqueeze", keys, ctx.ints(2)), perm=[0, 1, 2, 4, 3])
    logits = _cast(ctx, ctx.op("MatMul", grouped, turned), own, dtype)
    probabilities = _cast(ctx, _softmax(ctx, node, logits, mask, dtype), dtype, own)
    mixed = ctx.op("MatMul", probabilities, ctx.op("Unsqueeze", values, ctx.ints(2)))
    width = int(operands.value.meta["val"].shape[3])
    joined = ctx.op("Reshape", mixed, ctx.ints(0, heads, -1, width))
    return ctx.op("Transpose", joined, perm=[0, 2, 1, 3]), keys, values


def _softmax(ctx: Context, node: fx.Node, logits: ir.Value, mask: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Softmax in `dtype` of attention logits [B, Hkv, G, S, T], after scale, softcap and mask."""
    own = Attention.of(node)
    sinks, softcap = own.sinks, own.softcap

    def constant(value: float) -> ir.Value:
        return ctx.constant(np.asarray(value, np_dtype(dtype)))

    logits = ctx.op("Mul", logits, constant(own.scale))
    if softcap:
        logits = ctx.op("Mul", ctx.op("Tanh", ctx.op("Div", logits, constant(softcap))), constant(softcap))
    lowest = constant(torch.finfo(dtype).min)
    logits = ctx.op("Where", ctx.op("Unsqueeze", mask, ctx.ints(2)), logits, lowest)
    if sinks is None:
        return ctx.op("Softmax", logits, axis=-1)
    heads, groups = (int(side.meta["val"].shape[1]) for side in (own.query, own.key))
    column = ctx.op("Reshape", ctx.tensor(sinks, dtype), ctx.ints(1, groups, heads // groups, 1, 1))
    first = ctx.op("Slice", logits, ctx.ints(0), ctx.ints(1), ctx.ints(4))
    column = ctx.op("Expand", column, ctx.op("Shape", first))
    probabilities = ctx.op("Softmax", ctx.op("Concat", logits, column, axis=4), axis=-1)
    return ctx.op("Slice", probabilities, ctx.ints(0), ctx.ints(-1), ctx.ints(4))


def _cast(ctx: Context, value: ir.Value, source: torch.dtype, dtype: torch.dtype) -> ir.Value:
    return value if source == dtype else ctx.op("Cast", value, to=int(DTYPES[dtype]))


TABLE: Mapping[Any, Lowering] = {ATTENTION: _attention}
