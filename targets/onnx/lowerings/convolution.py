"""Convolutions along the sequence axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.targets.common.arguments import integer, listed, result_dtype
from moec.targets.onnx.context import Context, Lowering

aten = torch.ops.aten


def _conv1d(ctx: Context, node: fx.Node) -> ir.Value:
    """[B, C, S] with a weight [C', C / groups, K] -> [B, C', S']; symmetric padding."""
    x, weight, bias, stride, padding, dilation, groups = node.args
    dtype = result_dtype(node)
    return ctx.op(
        "Conv",
        ctx.tensor(x, dtype),
        ctx.tensor(weight, dtype),
        None if bias is None else ctx.tensor(bias, dtype),
        strides=listed(stride),
        pads=listed(padding) * 2,
        dilations=listed(dilation),
        group=integer(groups),
    )


TABLE: Mapping[Any, Lowering] = {aten.conv1d.default: _conv1d}
