"""`moec::linear_attention`: a few operators for one token, and a WHILE loop over the tokens of a prompt.

The loop stops before the padding at the end of a piece, so padding changes no state. Without control flow the loop is
unrolled, and the log decay and the update rate (or, without one, the value) of padding are set to 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.operands import LinearAttention
from moec.compiler.ir.program import LINEAR_ATTENTION
from moec.targets.tflite.context import Context
from moec.targets.tflite.engine import TOKEN_COUNT
from moec.targets.tflite.lowerings.elementwise import Lowering
from moec.targets.tflite.model import Value

Step = Mapping[str, Value]
"""Operands of the op by name; operands with a sequence axis hold one token."""


def _linear_attention(ctx: Context, node: fx.Node) -> Sequence[Value]:
    own = LinearAttention.of(node)
    operands = {"query": own.query, "key": own.key, "value": own.value, "decay": own.decay, "beta": own.beta}
    tokens = {name: ctx.tensor(item, torch.float32) for name, item in operands.items() if item is not None}
    state, length = ctx.tensor(own.state, torch.float32), tokens["value"].shape[1]
    if length == 1:
        return _token(ctx, own, {**tokens, "state": state})
    if ctx.settings.branches:
        return _loop(ctx, node, tokens, state)
    return _unrolled(ctx, own, tokens, state)


def token_count(ctx: Context, length: int) -> Value:
    """How many of `length` tokens are not padding, int32 [1]: the signature's input, or a constant if it has none."""
    return ctx.shared_value(TOKEN_COUNT, lambda: ctx.constant(np.array([length]), torch.int32))


def _loop(ctx: Context, node: fx.Node, tokens: Step, state: Value) -> Sequence[Value]:
    """A WHILE over the tokens. Its body reads only loop-carried values, so all operands are carried."""
    own = LinearAttention.of(node)
    batch, length, heads, width = tokens["value"].shape
    carried = {
        "index": ctx.constant(np.array([0]), torch.int32),
        "count": token_count(ctx, length),
        "state": state,
        "out": ctx.constant(np.zeros((batch, length, max(heads, tokens["query"].shape[2]), width), np.float32)),
        **tokens,
    }
    again, body = ctx.branch(f"{node.name}.again"), ctx.branch(f"{node.name}.token")
    tested, given = (
        {name: inner.graph.input(name, value.shape, value.dtype) for name, value in carried.items()}
        for inner in (again, body)
    )
    again.graph.output("again", again.op("LESS", tested["index"], tested["count"], dtype="BOOL"))
    step = {name: body.gather(given[name], given["index"], 1) for name in tokens}
    out, present = _token(body, own, {**step, "state": given["state"]})
    place = body.concat([body.ints(0), given["index"], body.ints(0, 0)], 0)
    found = {
        "index": body.op("ADD", given["index"], body.constant(np.array([1]), torch.int32)),
        "state": present,
        "out": body.op("DYNAMIC_UPDATE_SLICE", given["out"], out, place, shape=given["out"].shape),
    }
    for name, value in given.items():
        body.graph.output(name, found.get(name, value))
    kinds = [(value.shape, value.dtype) for value in carried.values()]
    results = ctx.graph.op("WHILE", list(carried.values()), kinds, branches=(again.graph, body.graph))
    named = dict(zip(carried, results, strict=True))
    return named["out"], named["state"]


def _unrolled(ctx: Context, own: LinearAttention, tokens: Step, state: Value) -> Sequence[Value]:
    length = tokens["value"].shape[1]
    numbers = ctx.constant(np.arange(length), torch.int32)
    used = ctx.cast(ctx.op("LESS", numbers, token_count(ctx, length), shape=(length,), dtype="BOOL"), "FLOAT32")
    masked = dict(tokens)
    for name in {"decay", "beta" if "beta" in tokens else "value"} & tokens.keys():
        masked[name] = ctx.op("MUL", tokens[name], ctx.reshape(used, (1, length, *[1] * (tokens[name].rank - 2))))
    outs = []
    for index in range(length):
        step = {name: ctx.slice(value, 1, index, 1) for name, value in masked.items()}
        out, state = _token(ctx, own, {**step, "state": state})
        outs.append(out)
    return ctx.concat(outs, 1), state


def _token(ctx: Context, own: LinearAttention, step: Step) -> Sequence[Value]:
    """The output [B, 1, max(H, Hq), Dv] of one token, and the state [B, H, Dk, Dv] after it."""
    queries, keys, heads = own.heads
    key_width, width = own.widths
    state, shared = step["state"], max(queries, heads)
    batch = state.shape[0]
    key = ctx.reshape(_repeated(ctx, step["key"], keys, heads, 2), (batch, heads, key_width, 1))
    value = ctx.reshape(step["value"], (batch, heads, 1, width))
    if "decay" in step:
        kept = ctx.reshape(step["decay"], (batch, heads, key_width if step["decay"].rank == 4 else 1, 1))
        state = ctx.op("MUL", state, ctx.op("EXP", kept))
    if "beta" in step:
        known = ctx.reduce("SUM", ctx.op("MUL", state, key), [2], keep=True)
        rate = ctx.reshape(step["beta"], (batch, heads, 1, 1))
        value = ctx.op("MUL", ctx.op("SUB", value, known), rate)
    state = ctx.op("ADD", state, ctx.op("MUL", key, value))
    query = ctx.reshape(_repeated(ctx, step["query"], queries, shared, 2), (batch, shared, key_width, 1))
    read = ctx.reduce("SUM", ctx.op("MUL", _repeated(ctx, state, heads, shared, 1), query), [2], keep=True)
    out = ctx.op("MUL", ctx.reshape(read, (batch, 1, shared, width)), ctx.scalar(own.scale))
    return out, state


def _repeated(ctx: Context, value: Value, have: int, wanted: int, axis: int) -> Value:
    """Repeat each of `have` heads along `axis`, up to `wanted` heads."""
    if have == wanted:
        return value
    return ctx.gather(value, ctx.ints(*(head * have // wanted for head in range(wanted))), axis)


TABLE: Mapping[Any, Lowering] = {LINEAR_ATTENTION: _linear_attention}
"""Op of the graph -> function that emits its LiteRT operators."""
