"""`moec::attention` over the KV cache in the model's states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.operands import Attention, Indexer
from moec.compiler.ir.program import ATTENTION
from moec.targets.coreml.context import MIL_NAMES, Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering, where
from moec.targets.coreml.lowerings.shape import cut


def _attention(ctx: Context, node: fx.Node) -> Sequence[Var | None]:
    own = Attention.of(node)
    names, states = ctx.cache.names, ctx.cache.states
    keys = states.update(names[own.past_key], ctx.tensor(own.key))
    values = states.update(names[own.past_value], ctx.tensor(own.value))
    heads, groups = _heads(node)
    # Query heads of a group become more rows of one head, so that keys need not be repeated.
    rows = _grouped(ctx, own.query, groups)
    form = _elementary if own.sinks is not None or own.softcap else _fused
    mixed = form(ctx, node, rows, keys, values)
    width = int(own.value.meta["val"].shape[3])
    out = ctx.mb.reshape(x=mixed, shape=ctx.ints(1, heads, -1, width))
    out = ctx.mb.transpose(x=out, perm=ctx.ints(0, 2, 1, 3))
    # Present keys and values are the states. Only the outputs of the Program refer to them, so None will do.
    return ctx.cast(out, MIL_NAMES[result_dtype_of(node)]), None, None


def result_dtype_of(node: fx.Node) -> torch.dtype:
    """Dtype of the output of an attention node, whose value is a tuple."""
    dtype: torch.dtype = node.meta["val"][0].dtype
    return dtype


def _heads(node: fx.Node) -> tuple[int, int]:
    """Numbers of query heads and of key heads."""
    own = Attention.of(node)
    return int(own.query.meta["val"].shape[1]), int(own.key.meta["val"].shape[1])


def _grouped(ctx: Context, query: fx.Node, groups: int) -> Var:
    """[1, Hq, S, D] -> [1, Hkv, Hq / Hkv * S, D]."""
    value, shape = ctx.tensor(query), query.meta["val"].shape
    if int(shape[1]) == groups:
        return value
    return ctx.mb.reshape(x=value, shape=ctx.ints(1, groups, -1, int(shape[3])))


def _fused(ctx: Context, node: fx.Node, rows: Var, keys: Var, values: Var) -> Var:
    """Attention by `scaled_dot_product_attention`, whose scale is always 1 / sqrt(head size)."""
    own = Attention.of(node)
    fake = own.query.meta["val"]
    factor = own.scale * math.sqrt(int(fake.shape[3]))
    if not math.isclose(factor, 1.0, rel_tol=1e-6):
        rows = ctx.mb.mul(x=rows, y=ctx.tensor(factor, fake.dtype))
    return ctx.mb.scaled_dot_product_attention(query=rows, key=keys, value=values, attn_mask=_mask_rows(ctx, node))


def _elementary(ctx: Context, node: fx.Node, rows: Var, keys: Var, values: Var) -> Var:
    """Attention with a softcap or attention sinks, in elementary ops."""
    mb, own = ctx.mb, Attention.of(node)
    sinks, softcap = own.sinks, own.softcap
    product = mb.matmul(x=rows, y=keys, transpose_y=ctx.constant(True))
    logits = mb.mul(x=ctx.cast(product, "fp32"), y=ctx.tensor(own.scale, torch.float32))
    if softcap:
        capped = mb.tanh(x=mb.mul(x=logits, y=ctx.tensor(1 / softcap, torch.float32)))
        logits = mb.mul(x=capped, y=ctx.tensor(softcap, torch.float32))
    lowest = ctx.tensor(float(np.finfo(np.float32).min), torch.float32)
    logits = where(ctx, _mask_rows(ctx, node), logits, lowest, tuple(logits.shape))
    if sinks is not None:
        logits = mb.concat(values=[logits, _sink_column(ctx, node, logits)], axis=3)
    probabilities = mb.softmax(x=logits, axis=-1)
    if sinks is not None:
        probabilities = cut(ctx, probabilities, 3, 0, ctx.settings.context)
    return mb.matmul(x=ctx.cast(probabilities, MIL_NAMES[own.query.meta["val"].dtype]), y=values)


def _sink_column(ctx: Context, node: fx.Node, logits: Var) -> Var:
    """The sink of each row's head: [1, Hkv, G * S, 1] float32."""
    heads, groups = _heads(node)
    sinks = ctx.mb.reshape(
        x=ctx.tensor(Attention.of(node).sinks, torch.float32), shape=ctx.ints(1, groups, heads // groups, 1)
    )
    first = ctx.mb.mul(x=cut(ctx, logits, 3, 0, 1), y=ctx.tensor(0.0, torch.float32))
    # All logits are finite, masked ones included, so their product with 0 is 0, never NaN.
    spread = ctx.mb.reshape(x=first, shape=ctx.ints(1, groups, heads // groups, -1))
    return ctx.mb.reshape(x=ctx.mb.add(x=spread, y=sinks), shape=ctx.ints(1, groups, -1, 1))


def _mask_rows(ctx: Context, node: fx.Node) -> Var:
    """The mask for grouped rows: [1, 1, G * S, context] bool; layers with the same mask share one value."""
    heads, groups = _heads(node)
    times, own = heads // groups, Attention.of(node)
    mask = visible(ctx, own)
    if own.selected is not None:
        selected = ctx.mb.expand_dims(x=ctx.tensor(own.selected), axes=ctx.ints(1))
        mask = ctx.mb.logical_and(x=mask, y=selected)
    if times == 1:
        return mask

    def make() -> Var:
        repeated = ctx.mb.tile(x=ctx.cast(mask, "int32"), reps=ctx.ints(1, 1, times, 1))
        return ctx.cast(repeated, "bool")

    key = own.selected, own.cache_position, own.kind, own.window
    return ctx.shared(("mask rows", *key, times), make)


def visible(ctx: Context, own: Attention | Indexer) -> Var:
    """The mask [1, 1, S, context] bool of `moec.compiler.ir.ops.visible`; layers with the same mask share one value."""
    position, kind, window = own.cache_position, own.kind, own.window

    def make() -> Var:
        mb = ctx.mb
        slots = _slot_positions(ctx)
        query = ctx.shared(
            ("query slots", position),
            lambda: mb.expand_dims(x=ctx.tensor(position, torch.int32), axes=ctx.ints(0, 1, 3)),
        )
        allowed = mb.less_equal(x=slots, y=query)
        if ctx.cache.first_slot is not None:
            allowed = mb.logical_and(x=allowed, y=mb.greater_equal(x=slots, y=ctx.constant(np.int32(0))))
        if kind == "sliding":
            low = mb.sub(x=query, y=ctx.constant(np.int32(window)))
            allowed = mb.logical_and(x=allowed, y=mb.greater(x=slots, y=low))
        if kind == "chunked":
            size = ctx.constant(np.int32(window))
            same = mb.equal(x=mb.floor_div(x=slots, y=size), y=mb.floor_div(x=query, y=size))
            allowed = mb.logical_and(x=allowed, y=same)
        return allowed

    return ctx.shared(("visible", position, kind, window), make)


def _slot_positions(ctx: Context) -> Var:
    """Position of the token in each slot, int32 [1, 1, 1, context]; negative before the first slot in use."""
    slots = ctx.constant(np.arange(ctx.settings.context, dtype=np.int32)[None, None, None])
    first = ctx.cache.first_slot
    return slots if first is None else ctx.shared("slot positions", lambda: ctx.mb.sub(x=slots, y=first))


TABLE: Mapping[Any, Lowering] = {ATTENTION: _attention}
