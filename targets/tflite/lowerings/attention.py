"""`moec::attention` over a KV cache of fixed capacity: new keys and values are written to their slots.

Slots after the newest token hold stale values or the keys of padding. The causal mask gives them a weight of exactly 0
(exp(-1e9) underflows), and they are overwritten before a token may attend to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.operands import Attention, Indexer
from moec.compiler.ir.program import ATTENTION
from moec.targets.common.arguments import shape_of
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.lowerings.elementwise import Lowering, choose
from moec.targets.tflite.lowerings.linear import batch_matmul
from moec.targets.tflite.model import Value

MASKED = -1e9


def _attention(ctx: Context, node: fx.Node) -> Sequence[Value]:
    own = Attention.of(node)
    if own.attention_mask is not None:
        raise refuse(node, "attention with a padding mask is not supported")
    keys = updated(ctx, own.past_key, own.key, own.cache_position)
    values = updated(ctx, own.past_value, own.value, own.cache_position)
    heads, length, depth = shape_of(own.query)[1:]
    groups, capacity, width = keys.shape[1], ctx.settings.capacity, values.shape[3]
    # The query heads of a group are contiguous: one product per key head, without repeating the keys.
    scaled = ctx.op("MUL", ctx.tensor(own.query), ctx.scalar(own.scale))
    grouped = ctx.reshape(scaled, (1, groups, heads // groups * length, depth))
    logits = ctx.reshape(batch_matmul(ctx, grouped, keys, transposed=True), (1, heads, length, capacity))
    if own.softcap:
        cap = own.softcap
        logits = ctx.op("MUL", ctx.op("TANH", ctx.op("MUL", logits, ctx.scalar(1 / cap))), ctx.scalar(cap))
    logits = ctx.op("ADD", logits, _mask(ctx, own))
    probabilities = _softmax(ctx, logits, None if own.sinks is None else ctx.tensor(own.sinks, torch.float32))
    mixed = batch_matmul(ctx, ctx.reshape(probabilities, (1, groups, heads // groups * length, capacity)), values)
    out = ctx.transpose(ctx.reshape(mixed, (1, heads, length, width)), (0, 2, 1, 3))
    return out, keys, values


def updated(ctx: Context, past: fx.Node, new: fx.Node, position: fx.Node) -> Value:
    """The cache [1, heads, capacity, D] with the new tokens written to their slots."""

    def start() -> Value:
        first = ctx.slice(ctx.tensor(position, torch.int64), 0, 0, 1)
        return ctx.concat([ctx.ints(0, 0), first, ctx.ints(0)], 0)

    cache = ctx.tensor(past)
    begin = ctx.shared_value(("start of update", position), start)
    return ctx.op("DYNAMIC_UPDATE_SLICE", cache, ctx.tensor(new), begin, shape=cache.shape)


def _mask(ctx: Context, own: Attention) -> Value:
    """Additive mask [1, 1, S, capacity]: 0 where a slot is attended to, else `MASKED`; layers of one kind share it."""
    allowed = visible(ctx, own)
    if own.selected is not None:
        allowed = ctx.op("LOGICAL_AND", allowed, ctx.reshape(ctx.tensor(own.selected), allowed.shape))

    def make() -> Value:
        added = choose(ctx, allowed, ctx.scalar(0.0), ctx.scalar(MASKED))
        return ctx.reshape(added, (1, 1, *added.shape))

    return ctx.shared_value(("mask", allowed), make)


def visible(ctx: Context, own: Attention | Indexer) -> Value:
    """The mask of `moec.compiler.ir.ops.visible`, bool [S, capacity]; layers of one kind share it."""
    position, kind, window = own.cache_position, own.kind, own.window

    def make() -> Value:
        slots = np.arange(ctx.settings.capacity)
        query = ctx.reshape(ctx.tensor(position, torch.int64), (shape_of(position)[0], 1))
        line = ctx.constant(slots[None], torch.int32)
        allowed = ctx.op("LESS_EQUAL", line, query, dtype="BOOL")
        size = ctx.constant(np.int32(window), torch.int32)
        if kind == "sliding":
            near = ctx.op("GREATER", line, ctx.op("SUB", query, size), dtype="BOOL")
            allowed = ctx.op("LOGICAL_AND", allowed, near)
        elif kind == "chunked":
            chunk = ctx.constant(slots[None] // window, torch.int32)
            same = ctx.op("EQUAL", chunk, ctx.op("FLOOR_DIV", query, size), dtype="BOOL")
            allowed = ctx.op("LOGICAL_AND", allowed, same)
        return allowed

    return ctx.shared_value(("visible", position, kind, window), make)


def _softmax(ctx: Context, logits: Value, sinks: Value | None) -> Value:
    """Softmax over the slots. An attention sink is one more column per head, which is dropped afterwards."""
    if sinks is None:
        return ctx.op("SOFTMAX", logits, beta=1.0)
    column = ctx.expand(ctx.reshape(sinks, (1, sinks.shape[0], 1, 1)), (*logits.shape[:3], 1))
    probabilities = ctx.op("SOFTMAX", ctx.concat([logits, column], 3), beta=1.0)
    return ctx.slice(probabilities, 3, 0, logits.shape[3])


TABLE: Mapping[Any, Lowering] = {ATTENTION: _attention}
