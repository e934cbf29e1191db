"""The states of a signature: KV caches of fixed capacity, the last inputs of convolutions, and states of scans.

The last piece of a prompt is padded at its end. In a KV cache, padding comes after every token and does no harm. Other
states must exclude it, so prefill signatures have an input with the number of tokens that are not padding:
the state of a convolution is cut there, and a scan stops there.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.program import CACHE_KINDS, CAUSAL_CONV, LINEAR_ATTENTION, StateSpec
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.engine import CACHE_PREFIX, CONVOLUTION_PREFIX, RECURRENCE_PREFIX, TOKEN_COUNT
from moec.targets.tflite.lowerings.convolution import inputs_of
from moec.targets.tflite.model import Value

aten = torch.ops.aten


def state_name(kind: str, layer: int) -> str:
    """Name of a state in the file; KV caches have the names that LiteRT's tools give them."""
    prefixes = {
        "key": f"{CACHE_PREFIX}k_",
        "value": f"{CACHE_PREFIX}v_",
        "index_key": f"{CACHE_PREFIX}index_",
        "conv": CONVOLUTION_PREFIX,
        "recurrent": RECURRENCE_PREFIX,
    }
    return f"{prefixes[kind]}{layer}"


def add_state(ctx: Context, node: fx.Node, state: StateSpec) -> None:
    """Add the input for the state that `node` reads, float32; a KV cache is [1, heads, capacity, head size]."""
    sizes = [1, *state.input.shape[1:]]
    if state.kind in CACHE_KINDS:
        sizes[2] = ctx.settings.capacity
    ctx.bind(node, ctx.graph.input(state_name(state.kind, state.layer), [int(size) for size in sizes], "FLOAT32"))


def add_token_count(ctx: Context) -> Value:
    """Add the input with the number of tokens of a call that are not padding, int32 [1]."""
    return ctx.graph.input(TOKEN_COUNT, (1,), "INT32")


def state_without_padding(ctx: Context, node: fx.Node, count: Value) -> Value:
    """The new state `node`, computed without the padding at the end of the new tokens.

    Args:
        ctx: The signature.
        node: The new state of a `moec::causal_conv`; that of a `moec::linear_attention`, whose scan excludes padding
            already; or the last elements along an axis of past state and new inputs, concatenated.
        count: See `add_token_count`.

    Raises:
        LoweringError: The state is computed in another way.
    """
    source: Any = node.args[0]
    if node.target is operator.getitem and source.target is LINEAR_ATTENTION and node.args[1] == 1:
        return ctx.tensor(node)
    if node.target is operator.getitem and source.target is CAUSAL_CONV and node.args[1] == 1:
        joined, axis = inputs_of(ctx, source), 2
    elif node.target is aten.slice.Tensor and source.target is aten.cat.default and _is_last(node, source):
        joined, axis = ctx.tensor(source), int(node.args[1])  # type: ignore[arg-type]
    else:
        raise refuse(node, "a state other than the last inputs of a convolution is not supported")
    ends = [ctx.ints(*[0] * size) for size in (axis, joined.rank - axis - 1) if size]
    ends.insert(1 if axis else 0, count)
    begin = ctx.shared_value(("end of state", count, axis, joined.rank), lambda: ctx.concat(ends, 0))
    shape = tuple(int(size) for size in node.meta["val"].shape)
    return ctx.op("SLICE", joined, begin, ctx.ints(*shape), shape=shape)


def _is_last(node: fx.Node, source: fx.Node) -> bool:
    """Whether a slice is the end of `source`, a state with new inputs appended, and as long as that state."""
    parts: Any = source.args[0]
    axis = source.args[1]
    kept = int(node.meta["val"].shape[axis])
    return (node.args[1:3], parts[0].op) == ((axis, -kept), "placeholder")
