"""Normalisation and rotary embedding, in elementary ops that XNNPACK supports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.operands import RmsNorm, Rotary
from moec.compiler.ir.program import RMS_NORM, ROTARY
from moec.targets.common.arguments import listed, result_dtype
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.lowerings.elementwise import Lowering
from moec.targets.tflite.model import Value

aten = torch.ops.aten


def _rms_norm(ctx: Context, node: fx.Node) -> Value:
    own = RmsNorm.of(node)
    value = ctx.tensor(own.hidden_states)
    normed = _scaled_by_variance(ctx, value, value, own.eps)
    return normed if own.weight is None else ctx.op("MUL", normed, ctx.tensor(own.weight, result_dtype(node)))


def _scaled_by_variance(ctx: Context, value: Value, centred: Value, eps: float) -> Value:
    """`centred / sqrt(mean(centred ** 2) + eps)` over the last axis."""
    square = ctx.reduce("MEAN", ctx.op("MUL", centred, centred), [value.rank - 1], keep=True)
    return ctx.op("MUL", centred, ctx.op("RSQRT", ctx.op("ADD", square, ctx.scalar(eps))))


def _layer_norm(ctx: Context, node: fx.Node) -> Value:
    x, sizes, weight, bias, eps, _cudnn = node.args
    dtype = result_dtype(node)
    if len(listed(sizes)) != 1:
        raise refuse(node, "a layer norm over several axes is not supported")
    value = ctx.tensor(x, dtype)
    mean = ctx.reduce("MEAN", value, [value.rank - 1], keep=True)
    normed = _scaled_by_variance(ctx, value, ctx.op("SUB", value, mean), float(eps))  # type: ignore[arg-type]
    if weight is not None:
        normed = ctx.op("MUL", normed, ctx.tensor(weight, dtype))
    return normed if bias is None else ctx.op("ADD", normed, ctx.tensor(bias, dtype))


def _rotary(ctx: Context, node: fx.Node) -> Value:
    own = Rotary.of(node)
    x, cos, sin = (ctx.tensor(operand) for operand in (own.x, own.cos, own.sin))
    half, axis = x.shape[-1] // 2, x.rank - 1
    turned = ctx.concat([ctx.op("NEG", ctx.slice(x, axis, half, half)), ctx.slice(x, axis, 0, half)], axis)
    return ctx.op("ADD", ctx.op("MUL", x, cos), ctx.op("MUL", turned, sin))


TABLE: Mapping[Any, Lowering] = {
    RMS_NORM: _rms_norm,
    ROTARY: _rotary,
    aten.layer_norm.default: _layer_norm,
}
