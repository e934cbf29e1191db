"""Reductions, argmax, softmax, top-k and cumulative sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.targets.common.arguments import integer, listed
from moec.targets.onnx.context import Context, Lowering

aten = torch.ops.aten


def _reduce(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        source, axes, keep = node.args
        return ctx.op(op_type, ctx.tensor(source), ctx.ints(*listed(axes)), keepdims=int(bool(keep)))

    return lower


def _argmax(ctx: Context, node: fx.Node) -> ir.Value:
    source, axis, keep = node.args
    return ctx.op("ArgMax", ctx.tensor(source), axis=integer(axis), keepdims=int(bool(keep)))


def _softmax(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Softmax", ctx.tensor(node.args[0]), axis=integer(node.args[1]))


def _topk(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    source, count, axis, largest, _sorted = node.args
    return ctx.ops(
        "TopK",
        ctx.tensor(source),
        ctx.dims([count]),
        outputs=2,
        axis=integer(axis),
        largest=int(bool(largest)),
        sorted=1,
    )


def _cumsum(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("CumSum", ctx.tensor(node.args[0]), ctx.tensor(node.args[1], torch.int64))


TABLE: Mapping[Any, Lowering] = {
    aten.sum.dim_IntList: _reduce("ReduceSum"),
    aten.mean.dim: _reduce("ReduceMean"),
    aten.amax.default: _reduce("ReduceMax"),
    aten.amin.default: _reduce("ReduceMin"),
    aten.argmax.default: _argmax,
    aten._softmax.default: _softmax,
    aten.topk.default: _topk,
    aten.cumsum.default: _cumsum,
}
