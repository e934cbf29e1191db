"""Convolutions over the tokens, as LiteRT's convolutions of images of height 1, whose channels come last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import integer, listed, node_of, result_dtype, shape_of
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.library import schema
from moec.targets.tflite.lowerings.elementwise import Lowering
from moec.targets.tflite.model import Value

aten = torch.ops.aten


def _conv1d(ctx: Context, node: fx.Node) -> Value:
    """[B, C, S] with a weight [C', C / groups, K] -> [B, C', S']; padding is the same on both sides."""
    arguments: list[Any] = list(node.args)
    x, weight, bias, stride, padding, dilation, groups = arguments
    (step,), (pad,), (gap,) = listed(stride), listed(padding), listed(dilation)
    batch, channels, results = shape_of(node)
    apart = integer(groups) > 1
    if apart and groups != shape_of(x)[1]:
        raise refuse(node, "a convolution in groups of several channels has no form")
    image = ctx.transpose(ctx.tensor(x, result_dtype(node)), (0, 2, 1))
    image = ctx.reshape(_padded(ctx, image, pad), (batch, 1, image.shape[1] + 2 * pad, image.shape[2]))
    zeros = ctx.constant(np.zeros(channels, np.float32))
    out = ctx.op(
        "DEPTHWISE_CONV_2D" if apart else "CONV_2D",
        image,
        _filter(ctx, node_of(weight), (-1, 1, 2, 0) if apart else (0, -1, 2, 1)),
        zeros if bias is None else ctx.tensor(bias, torch.float32),
        shape=(batch, 1, results, channels),
        padding=schema().Padding.VALID,
        strideW=step,
        strideH=1,
        dilationWFactor=gap,
        dilationHFactor=1,
        **({"depthMultiplier": channels // groups} if apart else {}),
    )
    return ctx.transpose(ctx.reshape(out, (batch, results, channels)), (0, 2, 1))


def _padded(ctx: Context, value: Value, pad: int) -> Value:
    """[B, S, C] with `pad` zeros before and behind the tokens."""
    if not pad:
        return value
    batch, length, channels = value.shape
    places = ctx.constant(np.array([[0, 0], [pad, pad], [0, 0]]), torch.int32)
    return ctx.op("PADV2", value, places, ctx.scalar(0.0), shape=(batch, length + 2 * pad, channels))


def _filter(ctx: Context, node: fx.Node, axes: tuple[int, ...]) -> Value:
    """The weight [C', C / groups, K] with its axes in the order that LiteRT wants, -1 being the height."""
    if node.op == "get_attr":
        weight = ctx.shared.weights.turned(str(node.target), node.meta["val"].dtype, axes)
        return ctx.float32(ctx.graph.weight(weight))
    turned = ctx.transpose(ctx.tensor(node, torch.float32), [axis for axis in axes if axis >= 0])
    return ctx.reshape(turned, [1 if axis < 0 else shape_of(node)[axis] for axis in axes])


TABLE: Mapping[Any, Lowering] = {aten.conv1d.default: _conv1d}
