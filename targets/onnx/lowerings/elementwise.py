"""Elementwise ops, comparisons and casts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.targets.common.arguments import integer, is_tensor, result_dtype
from moec.targets.onnx.context import Context, Lowering

aten = torch.ops.aten


ROWS: Mapping[Any, str] = {
    aten.neg.default: "Neg",
    aten.abs.default: "Abs",
    aten.exp.default: "Exp",
    aten.log.default: "Log",
    aten.sqrt.default: "Sqrt",
    aten.reciprocal.default: "Reciprocal",
    aten.floor.default: "Floor",
    aten.ceil.default: "Ceil",
    aten.round.default: "Round",
    aten.sign.default: "Sign",
    aten.cos.default: "Cos",
    aten.sin.default: "Sin",
    aten.tanh.default: "Tanh",
    aten.erf.default: "Erf",
    aten.sigmoid.default: "Sigmoid",
    aten.relu.default: "Relu",
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
"""Ops that are one operator of ONNX with the same operands in the same order."""


def _row(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        # A number among the operands takes the dtype that the op computes in, which is that of its result.
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


def _cast(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.tensor(node.args[0], result_dtype(node))


def _floor_divide(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    left, right = (ctx.tensor(argument, dtype) for argument in node.args)
    if dtype.is_floating_point:
        return ctx.op("Floor", ctx.op("Div", left, right))
    # ONNX Div truncates; with Mod of Python's sign the difference divides exactly.
    return ctx.op("Div", ctx.op("Sub", left, ctx.op("Mod", left, right)), right)


def _size_arithmetic(op_type: str) -> Lowering:
    """Arithmetic on sizes: lazy, since most of it is never asked for."""

    def lower(ctx: Context, node: fx.Node) -> Callable[[], ir.Value]:
        def make() -> ir.Value:
            return ctx.shared(
                ("size", str(node.meta["val"])), lambda: ctx.op(op_type, *(ctx.size(a) for a in node.args))
            )

        return make

    return lower


def _sym_size(ctx: Context, node: fx.Node) -> Callable[[], ir.Value]:
    source, axis = node.args
    assert isinstance(source, fx.Node)
    return lambda: ctx.axis_length(source, integer(axis))


TABLE: Mapping[Any, Lowering] = {
    **{op: _row(op_type) for op, op_type in ROWS.items()},
    aten.rsqrt.default: _rsqrt,
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.clamp.default: _clamp,
    aten.floor_divide.default: _floor_divide,
    aten._to_copy.default: _cast,
    aten.sym_size.int: _sym_size,
    operator.add: _size_arithmetic("Add"),
    operator.neg: _size_arithmetic("Neg"),
    operator.sub: _size_arithmetic("Sub"),
    operator.mul: _size_arithmetic("Mul"),
    operator.floordiv: _size_arithmetic("Div"),
}
