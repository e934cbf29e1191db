"""Elementwise ops, comparisons and casts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.targets.common.arguments import is_tensor, result_dtype
from moec.targets.common.table import named
from moec.targets.onnx.context import Context, Lowering

aten = torch.ops.aten


ROWS: Mapping[Any, str] = {
    **named("neg abs exp log sqrt reciprocal floor ceil round sign cos sin tanh erf sigmoid relu", str.capitalize),
    aten.add.Tensor: "Add",
    aten.sub.Tensor: "Sub",
    aten.mul.Tensor: "Mul",
    aten.div.Tensor: "Div",
    aten.maximum.default: "Max",
    aten.minimum.default: "Min",
    aten.pow.Tensor_Tensor: "Pow",
    aten.eq.Tensor: "Equal",
    aten.lt.Tensor: "Less",
    aten.le.Tensor: "LessOrEqual",
    aten.gt.Tensor: "Greater",
    aten.ge.Tensor: "GreaterOrEqual",
    aten.logical_not.default: "Not",
    aten.logical_and.default: "And",
    aten.logical_or.default: "Or",
    aten.where.self: "Where",
    aten.bitwise_and.Tensor: "BitwiseAnd",
    aten.bitwise_or.Tensor: "BitwiseOr",
    aten.bitwise_not.default: "BitwiseNot",
}
"""Ops that are one ONNX operator with the same operands in the same order."""


def _row(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        # A Python number among the operands is converted to the dtype of the result, in which the op computes.
        dtype = result_dtype(node)
        return ctx.op(op_type, *(ctx.tensor(item, None if is_tensor(item) else dtype) for item in node.args))

    return lower


def _rsqrt(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Reciprocal", ctx.op("Sqrt", ctx.tensor(node.args[0])))


def _silu(ctx: Context, node: fx.Node) -> ir.Value:
    x = ctx.tensor(node.args[0])
    return ctx.op("Mul", x, ctx.op("Sigmoid", x))


def _gelu(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Gelu", ctx.tensor(node.args[0]), approximate=node.kwargs.get("approximate", "none"))


def _softplus(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Softplus", ctx.tensor(node.args[0]))


def _clamp(ctx: Context, node: fx.Node) -> ir.Value:
    source, *bounds = node.args
    limits = [None if bound is None else ctx.tensor(bound, result_dtype(node)) for bound in bounds]
    return ctx.op("Clip", ctx.tensor(source), *limits)


def _floor_divide(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    left, right = (ctx.tensor(argument, dtype) for argument in node.args)
    if dtype.is_floating_point:
        return ctx.op("Floor", ctx.op("Div", left, right))
    # ONNX Div truncates. Mod has the sign of the divisor, as in Python, so left - left % right divides exactly.
    return ctx.op("Div", ctx.op("Sub", left, ctx.op("Mod", left, right)), right)


TABLE: Mapping[Any, Lowering] = {
    **{op: _row(op_type) for op, op_type in ROWS.items()},
    aten.rsqrt.default: _rsqrt,
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.clamp.default: _clamp,
    aten.floor_divide.default: _floor_divide,
}
