"""Convolutions along the sequence axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.experts import Gate
from moec.compiler.ir.operands import CausalConv
from moec.compiler.ir.program import CAUSAL_CONV
from moec.targets.common.arguments import integer, listed, result_dtype, shape_of
from moec.targets.coreml.context import MIL_NAMES, Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering
from moec.targets.coreml.lowerings.experts import activate
from moec.targets.coreml.lowerings.shape import cut

aten = torch.ops.aten


def _conv1d(ctx: Context, node: fx.Node) -> Var:
    """[1, C, S] with a weight [C', C / groups, K] -> [1, C', S']; symmetric padding."""
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


def _causal_conv(ctx: Context, node: fx.Node) -> Sequence[Var]:
    """The convolution over the concatenation of its state and the new inputs."""
    own = CausalConv.of(node)
    dtype, kept, taps = result_dtype(own.x), int(shape_of(own.state)[2]), int(shape_of(own.weight)[2])
    joined = ctx.mb.concat(values=[ctx.tensor(own.state, dtype), ctx.tensor(own.x)], axis=2)
    skipped = kept + 1 - taps
    out = ctx.mb.conv(
        x=cut(ctx, joined, 2, skipped, None) if skipped else joined,
        weight=ctx.tensor(own.weight, dtype),
        pad_type="valid",
        groups=ctx.constant(int(shape_of(own.x)[1]), np.int32),
        **({} if own.bias is None else {"bias": ctx.tensor(own.bias, dtype)}),
    )
    present = ctx.cast(cut(ctx, joined, 2, -kept, None), MIL_NAMES[result_dtype(own.state)])
    return activate(ctx, out, Gate(own.activation, gated=False), dtype), present


TABLE: Mapping[Any, Lowering] = {aten.conv1d.default: _conv1d, CAUSAL_CONV: _causal_conv}
