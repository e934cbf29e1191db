"""Normalisation and rotary embedding. Norms are computed in fp32, even in an fp16 program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.operands import RmsNorm, Rotary
from moec.compiler.ir.program import RMS_NORM, ROTARY
from moec.targets.common.arguments import integer, listed, rank, real, result_dtype
from moec.targets.common.refusals import refuse
from moec.targets.coreml.context import MIL_NAMES, Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering

aten = torch.ops.aten


def _rms_norm(ctx: Context, node: fx.Node) -> Var:
    own, mb, dtype = RmsNorm.of(node), ctx.mb, result_dtype(node)
    value = ctx.tensor(own.hidden_states, torch.float32)
    mean = mb.reduce_mean(x=mb.mul(x=value, y=value), axes=ctx.ints(-1), keep_dims=ctx.constant(True))
    shifted = mb.add(x=mean, y=ctx.tensor(own.eps, torch.float32))
    scaled = mb.mul(x=value, y=mb.rsqrt(x=shifted, epsilon=ctx.tensor(0.0, torch.float32)))
    normed = ctx.cast(scaled, MIL_NAMES[dtype])
    return normed if own.weight is None else mb.mul(x=normed, y=ctx.tensor(own.weight, dtype))


def _layer_norm(ctx: Context, node: fx.Node) -> Var:
    x, sizes, weight, bias, eps, _cudnn = node.args
    dtype, widths = result_dtype(node), listed(sizes)
    if len(widths) != 1:
        raise refuse(node, "a layer norm over several axes is not supported")
    mb, value = ctx.mb, ctx.tensor(x, torch.float32)
    axes = ctx.ints(rank(node) - 1)
    centred = mb.sub(x=value, y=mb.reduce_mean(x=value, axes=axes, keep_dims=True))
    variance = mb.reduce_mean(x=mb.mul(x=centred, y=centred), axes=axes, keep_dims=True)
    shifted = mb.add(x=variance, y=ctx.tensor(real(eps), torch.float32))
    normed = mb.mul(x=centred, y=mb.rsqrt(x=shifted, epsilon=ctx.tensor(0.0, torch.float32)))
    if weight is not None:
        normed = mb.mul(x=normed, y=ctx.tensor(weight, torch.float32))
    if bias is not None:
        normed = mb.add(x=normed, y=ctx.tensor(bias, torch.float32))
    return ctx.cast(normed, MIL_NAMES[dtype])


def _rotary(ctx: Context, node: fx.Node) -> Var:
    """Rotary embedding: `x * cos + [-x2, x1] * sin`, where x1 and x2 are the halves of x."""
    own, mb, dtype, axis = Rotary.of(node), ctx.mb, result_dtype(node), rank(node) - 1
    value = ctx.tensor(own.x, dtype)
    if integer(int(node.meta["val"].shape[-1])) % 2:
        raise refuse(node, "a rotary embedding of odd width is not supported")
    first, second = mb.split(x=value, num_splits=2, axis=axis)
    turned = mb.concat(values=[mb.mul(x=second, y=ctx.tensor(-1.0, dtype)), first], axis=axis)
    return mb.add(x=mb.mul(x=value, y=ctx.tensor(own.cos, dtype)), y=mb.mul(x=turned, y=ctx.tensor(own.sin, dtype)))


TABLE: Mapping[Any, Lowering] = {
    RMS_NORM: _rms_norm,
    ROTARY: _rotary,
    aten.layer_norm.default: _layer_norm,
}
