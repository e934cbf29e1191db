"""Convolutions over the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import integer, listed, result_dtype
from moec.targets.coreml.context import Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering

aten = torch.ops.aten


def _conv1d(ctx: Context, node: fx.Node) -> Var:
    """[1, C, S] with a weight [C', C / groups, K] -> [1, C', S']; padding is the same on both sides."""
    x, weight, bias, stride, padding, dilation, groups = node.args
    dtype = result_dtype(node)
    given = {} if bias is None else {"bias": ctx.tensor(bias, dtype)}
    return ctx.mb.conv(
        x=ctx.tensor(x, dtype),
        weight=ctx.tensor(weight, dtype),
        strides=ctx.ints(*listed(stride)),
        pad_type="custom",
        pad=ctx.ints(*listed(padding) * 2),
        dilations=ctx.ints(*listed(dilation)),
        groups=ctx.constant(integer(groups), np.int32),
        **given,
    )


TABLE: Mapping[Any, Lowering] = {aten.conv1d.default: _conv1d}
