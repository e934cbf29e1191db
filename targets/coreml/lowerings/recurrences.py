"""`moec::linear_attention`: a few operations for one token, and a `while_loop` over the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.operands import LinearAttention
from moec.compiler.ir.program import LINEAR_ATTENTION
from moec.targets.common.arguments import result_dtype, shape_of
from moec.targets.coreml.context import MIL_NAMES, Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering

Step = Mapping[str, Var]
"""Operands of the op by name; operands with a sequence axis hold one token."""


def _linear_attention(ctx: Context, node: fx.Node) -> Sequence[Var]:
    own = LinearAttention.of(node)
    operands = {"query": own.query, "key": own.key, "value": own.value, "decay": own.decay, "beta": own.beta}
    tokens = {name: ctx.tensor(item, torch.float32) for name, item in operands.items() if item is not None}
    state = ctx.tensor(own.state, torch.float32)
    if shape_of(own.value)[1] == 1:
        out, present = _token(ctx, own, {**tokens, "state": state})
    else:
        out, present = _loop(ctx, own, tokens, state)
    return ctx.cast(out, MIL_NAMES[result_dtype(own.value)]), ctx.cast(present, MIL_NAMES[result_dtype(own.state)])


def _loop(ctx: Context, own: LinearAttention, tokens: Step, state: Var) -> Sequence[Var]:
    """A `while_loop` that carries the index of the token, the state and the outputs."""
    mb, (batch, _, heads, width) = ctx.mb, shape_of(own.value)
    count, axis = ctx.axis_length(own.value, 1), ctx.constant(np.int32(1))
    sizes = [ctx.ints(batch), mb.expand_dims(x=count, axes=ctx.ints(0)), ctx.ints(max(heads, own.heads[0]), width)]
    out = mb.fill(shape=mb.concat(values=sizes, axis=ctx.constant(np.int32(0))), value=np.float32(0))

    def again(index: Var, *_: Var) -> Var:
        with ctx.branch():
            return mb.less(x=index, y=count)

    def token(index: Var, state: Var, out: Var) -> Sequence[Var]:
        with ctx.branch():
            place = mb.expand_dims(x=index, axes=ctx.ints(0))
            step = {name: mb.gather(x=value, indices=place, axis=axis) for name, value in tokens.items()}
            row, state = _token(ctx, own, {**step, "state": state})
            out = mb.scatter(data=out, indices=place, updates=row, axis=axis, mode="update")
            return mb.add(x=index, y=np.int32(1)), state, out

    _, present, found = mb.while_loop(_cond=again, _body=token, loop_vars=(np.int32(0), state, out))
    return found, present


def _token(ctx: Context, own: LinearAttention, step: Step) -> Sequence[Var]:
    """The output [B, 1, max(H, Hq), Dv] of one token, and the state [B, H, Dk, Dv] after it."""
    mb, (queries, keys, heads) = ctx.mb, own.heads
    key_width, width = own.widths
    batch, state, shared = int(shape_of(own.state)[0]), step["state"], max(queries, heads)

    def shaped(value: Var, *sizes: int) -> Var:
        return mb.reshape(x=value, shape=ctx.ints(batch, *sizes))

    def summed(value: Var) -> Var:
        return mb.reduce_sum(x=value, axes=ctx.ints(2), keep_dims=ctx.constant(True))

    key = shaped(_repeated(ctx, step["key"], keys, heads, 2), heads, key_width, 1)
    value = shaped(step["value"], heads, 1, width)
    if "decay" in step:
        kept = shaped(step["decay"], heads, key_width if len(step["decay"].shape) == 4 else 1, 1)
        state = mb.mul(x=state, y=mb.exp(x=kept))
    if "beta" in step:
        missing = mb.sub(x=value, y=summed(mb.mul(x=state, y=key)))
        value = mb.mul(x=missing, y=shaped(step["beta"], heads, 1, 1))
    state = mb.add(x=state, y=mb.mul(x=key, y=value))
    query = shaped(_repeated(ctx, step["query"], queries, shared, 2), shared, key_width, 1)
    read = summed(mb.mul(x=_repeated(ctx, state, heads, shared, 1), y=query))
    out = mb.mul(x=shaped(read, 1, shared, width), y=ctx.constant(np.float32(own.scale)))
    return out, state


def _repeated(ctx: Context, value: Var, have: int, wanted: int, axis: int) -> Var:
    """Repeat each of `have` heads along `axis`, up to `wanted` heads."""
    if have == wanted:
        return value
    places = ctx.ints(*(head * have // wanted for head in range(wanted)))
    return ctx.mb.gather(x=value, indices=places, axis=ctx.constant(np.int32(axis)))


TABLE: Mapping[Any, Lowering] = {LINEAR_ATTENTION: _linear_attention}
