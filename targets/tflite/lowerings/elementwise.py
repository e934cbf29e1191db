"""Elementwise ops, comparisons and casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moec.targets.common.arguments import result_dtype
from moec.targets.common.table import named
from moec.targets.tflite.context import Context
from moec.targets.tflite.model import Value

aten = torch.ops.aten
Lowering = Callable[[Context, fx.Node], Any]


ROWS: Mapping[Any, str] = {
    aten.add.Tensor: "ADD",
    aten.sub.Tensor: "SUB",
    aten.mul.Tensor: "MUL",
    aten.div.Tensor: "DIV",
    aten.floor_divide.default: "FLOOR_DIV",
    aten.maximum.default: "MAXIMUM",
    aten.minimum.default: "MINIMUM",
    aten.pow.Tensor_Tensor: "POW",
    aten.logical_and.default: "LOGICAL_AND",
    aten.logical_or.default: "LOGICAL_OR",
    aten.logical_not.default: "LOGICAL_NOT",
    **named("neg abs exp log sqrt rsqrt floor ceil round sign cos sin tanh relu", str.upper),
    aten.sigmoid.default: "LOGISTIC",
}
"""Ops that are one LiteRT operator with the same operands in the same order and a result of their dtype."""

COMPARISONS: Mapping[Any, str] = {
    aten.eq.Tensor: "EQUAL",
    aten.lt.Tensor: "LESS",
    aten.le.Tensor: "LESS_EQUAL",
    aten.gt.Tensor: "GREATER",
    aten.ge.Tensor: "GREATER_EQUAL",
}


def _row(name: str) -> Lowering:
    # A Python number among the operands is converted to the dtype of the result, in which the op computes.
    return lambda ctx, node: ctx.op(name, *(ctx.tensor(item, result_dtype(node)) for item in node.args))


def _compare(name: str) -> Lowering:
    return lambda ctx, node: ctx.op(name, *(ctx.tensor(item) for item in node.args), dtype="BOOL")


def _reciprocal(ctx: Context, node: fx.Node) -> Value:
    return ctx.op("DIV", ctx.scalar(1.0), ctx.tensor(node.args[0]))


def _silu(ctx: Context, node: fx.Node) -> Value:
    x = ctx.tensor(node.args[0])
    return ctx.op("MUL", x, ctx.op("LOGISTIC", x))


def _gelu(ctx: Context, node: fx.Node) -> Value:
    return ctx.op("GELU", ctx.tensor(node.args[0]), approximate=node.kwargs.get("approximate", "none") == "tanh")


def _softplus(ctx: Context, node: fx.Node) -> Value:
    """log(1 + e^x) as max(x, 0) + log(1 + e^-|x|), which cannot overflow."""
    x = ctx.tensor(node.args[0])
    small = ctx.op("EXP", ctx.op("NEG", ctx.op("ABS", x)))
    return ctx.op("ADD", ctx.op("RELU", x), ctx.op("LOG", ctx.op("ADD", small, ctx.scalar(1.0))))


def _clamp(ctx: Context, node: fx.Node) -> Value:
    source, low, high = node.args
    value, dtype = ctx.tensor(source), result_dtype(node)
    if low is not None:
        value = ctx.op("MAXIMUM", value, ctx.tensor(low, dtype))
    return value if high is None else ctx.op("MINIMUM", value, ctx.tensor(high, dtype))


def choose(ctx: Context, condition: Value, yes: Value, no: Value) -> Value:
    """`yes` where `condition` is true, else `no`; all three are broadcast."""
    return ctx.op(
        "SELECT_V2",
        condition,
        yes,
        no,
        dtype=yes.dtype,
    )


def _where(ctx: Context, node: fx.Node) -> Value:
    condition, yes, no = (ctx.tensor(item) for item in node.args)
    return choose(ctx, condition, yes, no)


TABLE: Mapping[Any, Lowering] = {
    **{op: _row(name) for op, name in ROWS.items()},
    **{op: _compare(name) for op, name in COMPARISONS.items()},
    aten.reciprocal.default: _reciprocal,
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.clamp.default: _clamp,
    aten.where.self: _where,
}
