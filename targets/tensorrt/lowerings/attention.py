"""`moec::attention` in elementary ops, or as the standard op without a past.

The parser refuses `Attention` with a past. The builder refuses it in float32 although the parser takes it, and
in float16 beside a Loop unless its layer is marked as decomposable.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from moec.targets.onnx.context import Context, real
from moec.targets.onnx.lowerings.attention import decomposed, visible

FUSED_OPSET = 23
HEAD_MULTIPLE, LARGEST_HEAD = 8, 256


def fused_refusal(node: fx.Node, opset: int) -> str:
    """Why the standard op does not serve `node`; empty where it does."""
    query, _key, value = (argument for argument in node.args[:3] if isinstance(argument, fx.Node))
    width = int(query.meta["val"].shape[3])
    if opset < FUSED_OPSET:
        return f"Attention is an operator from opset {FUSED_OPSET} on"
    if query.meta["val"].dtype != torch.float16:
        return "the builder takes Attention in float16 alone"
    if node.args[7] is not None or real(node.args[11]):
        return "Attention has no sinks, and the parser no soft cap"
    if int(value.meta["val"].shape[3]) != width or width % HEAD_MULTIPLE or width > LARGEST_HEAD:
        return f"heads must be equally wide, a multiple of {HEAD_MULTIPLE} and at most {LARGEST_HEAD}"
    return ""


def decomposed_attention(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    """Elementary ops; the softmax is computed in float32, as in the reference."""
    return decomposed(ctx, node, visible(ctx, node), wide=True)


def fused_attention(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    """The standard op where it serves."""
    if reason := fused_refusal(node, ctx.dialect.opset):
        ctx.reject(node, f"attention in elementary ops: {reason}")
        return decomposed_attention(ctx, node)
    mask = visible(ctx, node)
    query, key, value, past_key, past_value = (ctx.tensor(argument) for argument in node.args[:5])
    keys, values = ctx.op("Concat", past_key, key, axis=2), ctx.op("Concat", past_value, value, axis=2)
    out = ctx.op("Attention", query, keys, values, mask, scale=real(node.args[8]))
    return ctx.op("Transpose", out, perm=[0, 2, 1, 3]), keys, values
