"""Reductions, argmax, softmax, top-k and cumulative sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import integer, listed
from moec.targets.common.refusals import refuse
from moec.targets.coreml.context import Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering

aten = torch.ops.aten


def _reduce(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        source, axes, keep = node.args
        return getattr(ctx.mb, op_type)(x=ctx.tensor(source), axes=listed(axes), keep_dims=bool(keep))

    return lower


def _argmax(ctx: Context, node: fx.Node) -> Var:
    source, axis, keep = node.args
    return ctx.mb.reduce_argmax(x=ctx.tensor(source), axis=integer(axis), keep_dims=bool(keep))


def _softmax(ctx: Context, node: fx.Node) -> Var:
    return ctx.mb.softmax(x=ctx.tensor(node.args[0]), axis=integer(node.args[1]))


def _topk(ctx: Context, node: fx.Node) -> Sequence[Var]:
    source, count, axis, largest, _sorted = node.args
    if not isinstance(count, int):
        raise refuse(node, "a top-k with a symbolic k is not supported")
    found: Sequence[Var] = ctx.mb.topk(
        x=ctx.tensor(source), k=np.int32(count), axis=integer(axis), ascending=not largest
    )
    return found


def _cumsum(ctx: Context, node: fx.Node) -> Var:
    return ctx.mb.cumsum(x=ctx.tensor(node.args[0]), axis=integer(node.args[1]))


TABLE: Mapping[Any, Lowering] = {
    aten.sum.dim_IntList: _reduce("reduce_sum"),
    aten.mean.dim: _reduce("reduce_mean"),
    aten.amax.default: _reduce("reduce_max"),
    aten.amin.default: _reduce("reduce_min"),
    aten.argmax.default: _argmax,
    aten._softmax.default: _softmax,
    aten.topk.default: _topk,
    aten.cumsum.default: _cumsum,
}
