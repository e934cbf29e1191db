"""Convolutions along the sequence axis, as 2-D convolutions of images of height 1 with channels last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.experts import Gate
from moec.compiler.ir.operands import CausalConv
from moec.compiler.ir.program import CAUSAL_CONV
from moec.targets.common.arguments import integer, listed, node_of, result_dtype, shape_of
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.library import schema
from moec.targets.tflite.lowerings.elementwise import Lowering
from moec.targets.tflite.lowerings.experts import activate
from moec.targets.tflite.model import Value

aten = torch.ops.aten


def _conv1d(ctx: Context, node: fx.Node) -> Value:
    """[B, C, S] with a weight [C', C / groups, K] -> [B, C', S']; symmetric padding."""
    arguments: list[Any] = list(node.args)
    x, weight, bias, stride, padding, dilation, groups = arguments
    if integer(groups) > 1 and groups != shape_of(x)[1]:
        raise refuse(node, "a grouped convolution with several channels per group is not supported")
    (step,), (pad,), (gap,) = listed(stride), listed(padding), listed(dilation)
    rows = _padded(ctx, ctx.transpose(ctx.tensor(x, result_dtype(node)), (0, 2, 1)), pad)
    apart = integer(groups) > 1
    return ctx.transpose(_convolved(ctx, rows, node_of(weight), bias, apart=apart, step=step, gap=gap), (0, 2, 1))


def _causal_conv(ctx: Context, node: fx.Node) -> Sequence[Value]:
    """The convolution over the concatenation of its state and the new inputs."""
    own = CausalConv.of(node)
    kept, taps = shape_of(own.state)[2], shape_of(own.weight)[2]
    joined = inputs_of(ctx, node)
    rows = ctx.transpose(ctx.slice(joined, 2, kept + 1 - taps, joined.shape[2] - kept - 1 + taps), (0, 2, 1))
    out = ctx.transpose(_convolved(ctx, rows, own.weight, own.bias, apart=True), (0, 2, 1))
    present = ctx.slice(joined, 2, joined.shape[2] - kept, kept)
    return activate(ctx, out, Gate(own.activation, gated=False)), present


def inputs_of(ctx: Context, node: fx.Node) -> Value:
    """The state [B, C, W] of a `moec::causal_conv` and its new inputs [B, C, S], concatenated."""
    own = CausalConv.of(node)
    return ctx.shared_value(("inputs", node), lambda: ctx.concat([ctx.tensor(own.state), ctx.tensor(own.x)], 2))


def _convolved(
    ctx: Context, rows: Value, weight: fx.Node, bias: Any, *, apart: bool, step: int = 1, gap: int = 1
) -> Value:
    """[B, S, C] with a weight [C', C or 1, K] -> [B, S', C']; `apart`: depthwise."""
    batch, length, inner = rows.shape
    channels, _, taps = shape_of(weight)
    results = (length - gap * (taps - 1) - 1) // step + 1
    zeros = ctx.constant(np.zeros(channels, np.float32))
    out = ctx.op(
        "DEPTHWISE_CONV_2D" if apart else "CONV_2D",
        ctx.reshape(rows, (batch, 1, length, inner)),
        _filter(ctx, weight, (-1, 1, 2, 0) if apart else (0, -1, 2, 1)),
        zeros if bias is None else ctx.tensor(bias, torch.float32),
        shape=(batch, 1, results, channels),
        padding=schema().Padding.VALID,
        strideW=step,
        strideH=1,
        dilationWFactor=gap,
        dilationHFactor=1,
        **({"depthMultiplier": channels // inner} if apart else {}),
    )
    return ctx.reshape(out, (batch, results, channels))


def _padded(ctx: Context, value: Value, pad: int) -> Value:
    """[B, S, C] -> [B, S + 2 * pad, C], with zeros before and after the tokens."""
    if not pad:
        return value
    batch, length, channels = value.shape
    places = ctx.constant(np.array([[0, 0], [pad, pad], [0, 0]]), torch.int32)
    return ctx.op("PADV2", value, places, ctx.scalar(0.0), shape=(batch, length + 2 * pad, channels))


def _filter(ctx: Context, node: fx.Node, axes: tuple[int, ...]) -> Value:
    """The weight [C', C / groups, K] with its axes in LiteRT's order; -1 is the new axis of the height."""
    if node.op == "get_attr":
        weight = ctx.shared.weights.transposed(str(node.target), node.meta["val"].dtype, axes)
        return ctx.float32(ctx.graph.weight(weight))
    turned = ctx.transpose(ctx.tensor(node, torch.float32), [axis for axis in axes if axis >= 0])
    return ctx.reshape(turned, [1 if axis < 0 else shape_of(node)[axis] for axis in axes])


TABLE: Mapping[Any, Lowering] = {aten.conv1d.default: _conv1d, CAUSAL_CONV: _causal_conv}
