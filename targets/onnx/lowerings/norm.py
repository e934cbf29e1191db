"""Normalisation and rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.operands import RmsNorm, Rotary
from moec.compiler.ir.program import RMS_NORM, ROTARY
from moec.targets.common.arguments import integer, listed, rank, real, result_dtype
from moec.targets.common.refusals import refuse
from moec.targets.onnx.context import Context, Lowering, np_dtype
from moec.targets.onnx.lowerings.fusions import skip_norm

aten = torch.ops.aten


def _rms_norm(ctx: Context, node: fx.Node) -> ir.Value:
    own, dtype = RmsNorm.of(node), result_dtype(node)
    x, weight, eps = own.hidden_states, own.weight, own.eps
    if weight is None:
        width = int(x.meta["val"].shape[-1])
        scale = ctx.constant(np.ones(width, dtype=np_dtype(dtype)))
    else:
        scale = ctx.tensor(weight, dtype)
    # ONNX Runtime's own kernel is faster on CPU than the standard op.
    if ctx.dialect.contrib:
        fused = skip_norm(ctx, x, scale, eps)
        if fused is not None:
            return fused
        return ctx.op("SimplifiedLayerNormalization", ctx.tensor(x), scale, epsilon=eps, axis=-1, stash_type=1)
    return ctx.op("RMSNormalization", ctx.tensor(x), scale, epsilon=eps, axis=-1, stash_type=1)


def _layer_norm(ctx: Context, node: fx.Node) -> ir.Value:
    x, sizes, weight, bias, eps, _cudnn = node.args
    dtype = result_dtype(node)
    widths = listed(sizes)
    if len(widths) != 1:
        raise refuse(node, "a layer norm over several axes is not supported")
    width = integer(widths[0])
    scale = ctx.constant(np.ones(width, dtype=np_dtype(dtype))) if weight is None else ctx.tensor(weight, dtype)
    shift = None if bias is None else ctx.tensor(bias, dtype)
    return ctx.op("LayerNormalization", ctx.tensor(x, dtype), scale, shift, axis=-1, epsilon=real(eps))


def _rotary(ctx: Context, node: fx.Node) -> ir.Value:
    """`RotaryEmbedding` takes half of cos and sin, [B, S, D / 2]; all layers share these halves."""
    own = Rotary.of(node)
    x, cos, sin = own.x, own.cos, own.sin
    dtype, width = result_dtype(node), int(x.meta["val"].shape[-1])

    def half(table: Any) -> ir.Value:
        def make() -> ir.Value:
            value = ctx.tensor(table, dtype)
            first = ctx.op("Slice", value, ctx.ints(0), ctx.ints(width // 2), ctx.ints(rank(table) - 1))
            flat = ctx.op("Squeeze", first, ctx.ints(1))
            batch = ctx.axis_length(x, 0)
            length = ctx.axis_length(x, 2)
            sizes = [ctx.op("Reshape", size, ctx.ints(1)) for size in (batch, length)]
            return ctx.op("Expand", flat, ctx.op("Concat", *sizes, ctx.ints(width // 2), axis=0))

        return ctx.shared(("rotary half", table, width, dtype), make)

    return ctx.op("RotaryEmbedding", ctx.tensor(x), half(cos), half(sin))


def rotary_plain(ctx: Context, node: fx.Node) -> ir.Value:
    """Rotary embedding in elementary ops, for tables whose layout `RotaryEmbedding` does not take."""
    own = Rotary.of(node)
    x, cos, sin = own.x, own.cos, own.sin
    width, axis = int(x.meta["val"].shape[-1]), rank(x) - 1
    value, dtype = ctx.tensor(x), result_dtype(node)
    first = ctx.op("Slice", value, ctx.ints(0), ctx.ints(width // 2), ctx.ints(axis))
    second = ctx.op("Slice", value, ctx.ints(width // 2), ctx.ints(width), ctx.ints(axis))
    turned = ctx.op("Concat", ctx.op("Neg", second), first, axis=axis)
    return ctx.op("Add", ctx.op("Mul", value, ctx.tensor(cos, dtype)), ctx.op("Mul", turned, ctx.tensor(sin, dtype)))


def _rotary_any(ctx: Context, node: fx.Node) -> ir.Value:
    own = Rotary.of(node)
    tables = (own.cos, own.sin)
    fits = all(rank(table) == 4 and table.meta["val"].shape[1] == 1 for table in tables) and rank(node) == 4
    return _rotary(ctx, node) if fits else rotary_plain(ctx, node)


TABLE: Mapping[Any, Lowering] = {
    RMS_NORM: _rms_norm,
    ROTARY: _rotary_any,
    aten.layer_norm.default: _layer_norm,
}
