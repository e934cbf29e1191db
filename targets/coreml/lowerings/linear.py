"""Matrix products, with weights or between activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from moec.targets.common.arguments import result_dtype
from moec.targets.coreml.context import Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering

aten = torch.ops.aten


def project(ctx: Context, x: Var, weight: Var, bias: Var | None, dtype: torch.dtype) -> Var:
    """`x @ weight.T + bias`; without a bias, with the shared zeros of `Context.zeros`."""
    return ctx.mb.linear(x=x, weight=weight, bias=ctx.zeros(int(weight.shape[0]), dtype) if bias is None else bias)


def _linear(ctx: Context, node: fx.Node) -> Var:
    x, weight, bias = node.args
    assert isinstance(weight, fx.Node)
    dtype = result_dtype(node)
    value = ctx.tensor(x, dtype)
    constant_bias = bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")
    if weight.op == "get_attr" and constant_bias:
        return project(ctx, value, ctx.tensor(weight, dtype), None if bias is None else ctx.tensor(bias, dtype), dtype)
    product = ctx.mb.matmul(x=value, y=ctx.tensor(weight, dtype), transpose_y=ctx.constant(True))
    return product if bias is None else ctx.mb.add(x=product, y=ctx.tensor(bias, dtype))


def _matmul(ctx: Context, node: fx.Node) -> Var:
    left, right = node.args
    return ctx.mb.matmul(x=ctx.tensor(left), y=ctx.tensor(right))


TABLE: Mapping[Any, Lowering] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
}
