"""The states of a signature: key-value caches of fixed capacity, and the last inputs of short convolutions.

The last piece of a prompt is padded at its end. In a cache the padding lies behind every token. A convolution's state
ends with the newest token, so signatures for prompts have an input that tells how many tokens are none of padding, and
the state is cut there.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.program import CACHE_KINDS, CAUSAL_CONV, StateSpec
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.engine import CACHE_PREFIX, CONVOLUTION_PREFIX, TOKEN_COUNT
from moec.targets.tflite.lowerings.convolution import inputs_of
from moec.targets.tflite.model import Value

aten = torch.ops.aten


def state_name(kind: str, layer: int) -> str:
    """Name of a state in the file; caches have the names that LiteRT's tools give them."""
    return f"{CACHE_PREFIX}{kind[0]}_{layer}" if kind in CACHE_KINDS else f"{CONVOLUTION_PREFIX}{layer}"


def add_state(ctx: Context, node: fx.Node, state: StateSpec) -> None:
    """The input that `node` reads, float32 [1, heads, capacity, width] or [1, channels, kernel size]."""
    sizes = [1, *state.input.shape[1:]]
    if state.kind in CACHE_KINDS:
        sizes[2] = ctx.settings.capacity
    ctx.bind(node, ctx.graph.input(state_name(state.kind, state.layer), [int(size) for size in sizes], "FLOAT32"))


def add_token_count(ctx: Context) -> Value:
    """The input that tells how many tokens of a call are none of padding: int32 [1]."""
    return ctx.graph.input(TOKEN_COUNT, (1,), "INT32")


def unpadded(ctx: Context, node: fx.Node, kept: int, count: Value) -> Value:
    """The state [1, C, `kept`] that `node` cuts off the end of its past inputs and all new ones, without padding.

    Args:
        ctx: The signature.
        node: The present state of a `moec::causal_conv`, or a slice of the last `kept` of [1, C, `kept` + S].
        kept: Inputs that the state holds.
        count: See `add_token_count`.

    Raises:
        LoweringError: The state is made in another way.
    """
    source: Any = node.args[0]
    if node.target is operator.getitem and source.target is CAUSAL_CONV and node.args[1] == 1:
        joined = inputs_of(ctx, source)
    elif node.target is aten.slice.Tensor and source.target is aten.cat.default and node.args[2] == -kept:
        joined = ctx.tensor(source)
    else:
        raise refuse(node, "a state that is not the last of what a convolution takes in has no form")
    begin = ctx.shared_value(("end of state", count), lambda: ctx.concat([ctx.ints(0, 0), count], 0))
    shape = (*joined.shape[:2], kept)
    return ctx.op("SLICE", joined, begin, ctx.ints(*shape), shape=shape)
