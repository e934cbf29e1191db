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


def takes_tables(node: fx.Node) -> bool:
    """Whether `RotaryEmbedding` takes the tables of a `moec::rotary` node: [B, 1, S, D], for x [B, H, S, D]."""
    own = Rotary.of(node)
    return rank(node) == 4 and all(rank(table) == 4 and table.meta["val"].shape[1] == 1 for table in (own.cos, own.sin))


def half_tables(ctx: Context, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    """Half of cos and sin, [B, S, D / 2], as `RotaryEmbedding` takes them; all layers share these halves."""
    own = Rotary.of(node)
    x, dtype, width = own.x, result_dtype(node), int(own.x.meta["val"].shape[-1])

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

    return half(own.cos), half(own.sin)


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


def _rotary(ctx: Context, node: fx.Node) -> ir.Value:
    if not takes_tables(node):
        return rotary_plain(ctx, node)
    return ctx.op("RotaryEmbedding", ctx.tensor(Rotary.of(node).x), *half_tables(ctx, node))


TABLE: Mapping[Any, Lowering] = {
    RMS_NORM: _rms_norm,
    ROTARY: _rotary,
    aten.layer_norm.default: _layer_norm,
}
