"""`moec::attention` in elementary ops, or as the standard op `Attention` without its inputs for a past.

The parser does not support `Attention` with a past. The builder fails on it in float32, although the parser accepts it,
and in float16 in a network with a Loop, unless its layer is marked as decomposable.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.operands import Attention
from moec.targets.onnx.context import Context
from moec.targets.onnx.lowerings.attention import attended, decomposed

FUSED_OPSET = 23
HEAD_MULTIPLE, LARGEST_HEAD = 8, 256


def fused_refusal(node: fx.Node, opset: int) -> str:
    """Why `node` cannot be an `Attention` op; empty if it can."""
    own = Attention.of(node)
    query, value = own.query, own.value
    width = int(query.meta["val"].shape[3])
    if opset < FUSED_OPSET:
        return f"Attention needs opset {FUSED_OPSET} or later"
    if query.meta["val"].dtype != torch.float16:
        return "the builder supports Attention in float16 only"
    if own.sinks is not None or own.softcap:
        return "Attention has no sinks, and the parser does not support its softcap"
    if int(value.meta["val"].shape[3]) != width or width % HEAD_MULTIPLE or width > LARGEST_HEAD:
        return f"head sizes must be equal, a multiple of {HEAD_MULTIPLE} and at most {LARGEST_HEAD}"
    return ""


def decomposed_attention(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    """Attention in elementary ops, with the softmax in float32 as in the reference."""
    return decomposed(ctx, node, attended(ctx, node), wide=True)


def fused_attention(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    """The op `Attention` where it can be used, else elementary ops."""
    if reason := fused_refusal(node, ctx.dialect.opset):
        ctx.reject(node, f"attention in elementary ops: {reason}")
        return decomposed_attention(ctx, node)
    own, mask = Attention.of(node), attended(ctx, node)
    keys = ctx.op("Concat", ctx.tensor(own.past_key), ctx.tensor(own.key), axis=2)
    values = ctx.op("Concat", ctx.tensor(own.past_value), ctx.tensor(own.value), axis=2)
    out = ctx.op("Attention", ctx.tensor(own.query), keys, values, mask, scale=own.scale)
    return ctx.op("Transpose", out, perm=[0, 2, 1, 3]), keys, values
