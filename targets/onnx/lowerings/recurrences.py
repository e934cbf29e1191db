"""`moec::linear_attention` and `moec::causal_conv`: ONNX Runtime's kernels, or a Scan and a Conv in standard ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.experts import Gate
from moec.compiler.ir.operands import CausalConv, LinearAttention
from moec.compiler.ir.recurrences import CAUSAL_CONV, LINEAR_ATTENTION
from moec.targets.common.arguments import result_dtype, shape_of
from moec.targets.onnx.context import DTYPES, MS, Context, Lowering
from moec.targets.onnx.lowerings.grouped import activate

FUSED_ACTIVATIONS = {"identity": "none", "silu": "silu"}
"""Activations that `CausalConvWithState` can fuse -> its names for them."""


def _causal_conv(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    own = CausalConv.of(node)
    if not ctx.dialect.contrib or own.activation not in FUSED_ACTIVATIONS:
        return _plain_conv(ctx, own)
    # The CPU kernel supports float32 only. Its state holds K - 1 inputs and moec's holds more: zeros pad the weights.
    x, weight, state = (ctx.tensor(item, torch.float32) for item in (own.x, own.weight, own.state))
    missing = _kept(own) + 1 - _taps(own)
    if missing:
        weight = ctx.op("Pad", weight, ctx.ints(0, 0, missing, 0, 0, 0))
    bias = None if own.bias is None else ctx.tensor(own.bias, torch.float32)
    out, present = ctx.ops(
        "CausalConvWithState",
        *(x, weight, bias, state),
        outputs=2,
        domain=MS,
        activation=FUSED_ACTIVATIONS[own.activation],
    )
    out = _cast(ctx, out, torch.float32, result_dtype(own.x))
    return out, _cast(ctx, present, torch.float32, result_dtype(own.state))


def _plain_conv(ctx: Context, own: CausalConv) -> Sequence[ir.Value]:
    """The convolution over the concatenation of its state and the new inputs, in standard ops."""
    dtype, kept = result_dtype(own.x), _kept(own)
    joined = ctx.op("Concat", ctx.tensor(own.state, dtype), ctx.tensor(own.x), axis=2)
    skipped = kept + 1 - _taps(own)
    taken = ctx.op("Slice", joined, ctx.ints(skipped), ctx.ints(np.iinfo(np.int64).max), ctx.ints(2))
    bias = None if own.bias is None else ctx.tensor(own.bias, dtype)
    channels = int(own.x.meta["val"].shape[1])
    out = ctx.op("Conv", taken if skipped else joined, ctx.tensor(own.weight, dtype), bias, group=channels)
    present = ctx.op("Slice", joined, ctx.ints(-kept), ctx.ints(np.iinfo(np.int64).max), ctx.ints(2))
    out = activate(ctx, out, Gate(own.activation, gated=False), dtype)
    return out, _cast(ctx, present, dtype, result_dtype(own.state))


def _kept(own: CausalConv) -> int:
    return int(own.state.meta["val"].shape[2])


def _taps(own: CausalConv) -> int:
    return int(own.weight.meta["val"].shape[2])


def _linear_attention(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    own = LinearAttention.of(node)
    out, present = _kernel(ctx, own) if ctx.dialect.contrib else _scan(ctx, own)
    out = _cast(ctx, out, torch.float32, result_dtype(own.value))
    return out, _cast(ctx, present, torch.float32, result_dtype(own.state))


def _kernel(ctx: Context, own: LinearAttention) -> Sequence[ir.Value]:
    """`LinearAttention`, which takes heads side by side in the last axis and as many key heads as value heads."""
    queries, keys, heads = own.heads
    key_width, width = own.widths
    key = ctx.tensor(own.key, torch.float32)
    decay, beta = (None if item is None else ctx.tensor(item, torch.float32) for item in (own.decay, own.beta))
    if own.decay is not None and own.decay.meta["val"].ndim == 4:
        decay = ctx.op("Reshape", decay, ctx.ints(0, 0, heads * key_width))
    out, present = ctx.ops(
        "LinearAttention",
        ctx.op("Reshape", ctx.tensor(own.query, torch.float32), ctx.ints(0, 0, queries * key_width)),
        ctx.op("Reshape", _repeated(ctx, key, keys, heads), ctx.ints(0, 0, heads * key_width)),
        ctx.op("Reshape", ctx.tensor(own.value, torch.float32), ctx.ints(0, 0, heads * width)),
        *(ctx.tensor(own.state, torch.float32), decay, beta),
        outputs=2,
        domain=MS,
        update_rule=own.update_rule,
        q_num_heads=queries,
        kv_num_heads=heads,
        scale=own.scale,
    )
    return ctx.op("Reshape", out, ctx.ints(0, 0, max(queries, heads), width)), present


def _repeated(ctx: Context, value: ir.Value, have: int, wanted: int) -> ir.Value:
    """Repeat each head: [B, S, `have`, D] -> [B, S, `wanted`, D]. TensorRT cannot build a Scan over Expand's output."""
    if have == wanted:
        return value
    return ctx.op("Gather", value, ctx.ints(*(head * have // wanted for head in range(wanted))), axis=2)


def _scan(ctx: Context, own: LinearAttention) -> Sequence[ir.Value]:
    """A Scan over the tokens; its body is the op's definition for one token."""
    queries, keys, heads = own.heads
    operands = {"query": own.query, "key": own.key, "value": own.value, "decay": own.decay, "beta": own.beta}
    taken = {name: ctx.tensor(node, torch.float32) for name, node in operands.items() if node is not None}
    taken["query"] = _repeated(ctx, taken["query"], queries, max(queries, heads))
    taken["key"] = _repeated(ctx, taken["key"], keys, heads)
    batch, *kept = shape_of(own.state)
    sizes = {name: list(shape_of(node))[2:] for name, node in operands.items() if node is not None}
    sizes["query"][0], sizes["key"][0] = max(queries, heads), heads
    with ctx.subgraph("token") as body:
        step = {"state": _body_input(ctx, body, "state", (batch, *kept))}
        step |= {name: _body_input(ctx, body, name, (batch, *sizes[name])) for name in taken}
        body.outputs.extend(_token(ctx, own, step))
    present, out = ctx.ops(
        "Scan",
        *(ctx.tensor(own.state, torch.float32), *taken.values()),
        outputs=2,
        body=body,
        num_scan_inputs=len(taken),
        scan_input_axes=[1] * len(taken),
        scan_output_axes=[1],
    )
    return out, present


def _body_input(ctx: Context, body: ir.Graph, name: str, shape: Sequence[Any]) -> ir.Value:
    value = ir.Value(name=f"token_{name}", type=ir.TensorType(ir.DataType.FLOAT), shape=ctx.shape_of(shape))
    body.inputs.append(value)
    return value


def _token(ctx: Context, own: LinearAttention, step: Mapping[str, ir.Value]) -> Sequence[ir.Value]:
    """One token of the scan: the new state [B, H, Dk, Dv] and the output [B, max(H, Hq), Dv]."""
    queries, _, heads = own.heads
    state, key, value = step["state"], ctx.op("Unsqueeze", step["key"], ctx.ints(3)), step["value"]
    if own.decay is not None:
        axes = (2, 3) if own.decay.meta["val"].ndim == 3 else (3,)
        state = ctx.op("Mul", state, ctx.op("Exp", ctx.op("Unsqueeze", step["decay"], ctx.ints(*axes))))
    value = ctx.op("Unsqueeze", value, ctx.ints(2))
    if own.beta is not None:
        known = ctx.op("MatMul", ctx.op("Transpose", key, perm=[0, 1, 3, 2]), state)
        rate = ctx.op("Unsqueeze", step["beta"], ctx.ints(2, 3))
        value = ctx.op("Mul", ctx.op("Sub", value, known), rate)
    state = ctx.op("Add", state, ctx.op("Mul", key, value))
    read = state
    if queries > heads:
        read = ctx.op("Gather", state, ctx.ints(*(head * heads // queries for head in range(queries))), axis=1)
    out = ctx.op("MatMul", ctx.op("Unsqueeze", step["query"], ctx.ints(2)), read)
    out = ctx.op("Mul", ctx.op("Squeeze", out, ctx.ints(2)), ctx.constant(np.float32(own.scale)))
    return state, out


def _cast(ctx: Context, value: ir.Value, have: torch.dtype, wanted: torch.dtype) -> ir.Value:
    return value if have == wanted else ctx.op("Cast", value, to=int(DTYPES[wanted]))


TABLE: Mapping[Any, Lowering] = {CAUSAL_CONV: _causal_conv, LINEAR_ATTENTION: _linear_attention}
"""The lowering table: op of the graph -> function that emits its ONNX form."""
