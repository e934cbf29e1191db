"""Elementwise ops, comparisons and casts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.targets.onnx.context import Context, Lowering, integer, np_dtype, real, result_dtype

aten = torch.ops.aten


def _unary(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        return ctx.op(op_type, ctx.tensor(node.args[0], result_dtype(node)))

    return lower


def _binary(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        dtype = result_dtype(node)
        left, right = (ctx.tensor(argument, dtype) for argument in node.args[:2])
        if node.kwargs.get("alpha", 1) != 1:
            right = ctx.op("Mul", right, ctx.tensor(node.kwargs["alpha"], dtype))
        return ctx.op(op_type, left, right)

    return lower


def _reversed_subtract(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    return ctx.op("Sub", ctx.tensor(node.args[1], dtype), ctx.tensor(node.args[0], dtype))


def _compare(op_type: str, *, negate: bool = False) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        left, right = node.args[:2]
        dtypes = [a.meta["val"].dtype for a in (left, right) if isinstance(a, fx.Node)]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        if isinstance(right, float) and not dtype.is_floating_point:
            dtype = torch.float32
        if dtype is torch.bool and not all(isinstance(a, fx.Node) for a in (left, right)):
            dtype = torch.int64
        out = ctx.op(op_type, ctx.tensor(left, dtype), ctx.tensor(right, dtype))
        return ctx.op("Not", out) if negate else out

    return lower


def _power(ctx: Context, node: fx.Node) -> ir.Value:
    base, dtype = ctx.tensor(node.args[0], result_dtype(node)), result_dtype(node)
    exponent = node.args[1]
    if exponent == 2:
        return ctx.op("Mul", base, base)
    if exponent == 0.5:
        return ctx.op("Sqrt", base)
    return ctx.op("Pow", base, ctx.tensor(exponent, dtype))


def _base_power(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    return ctx.op("Pow", ctx.tensor(node.args[0], dtype), ctx.tensor(node.args[1], dtype))


def _rsqrt(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.op("Reciprocal", ctx.op("Sqrt", ctx.tensor(node.args[0])))


def _silu(ctx: Context, node: fx.Node) -> ir.Value:
    x = ctx.tensor(node.args[0])
    return ctx.op("Mul", x, ctx.op("Sigmoid", x))


def _gelu(ctx: Context, node: fx.Node) -> ir.Value:
    approximate = node.kwargs.get("approximate", "none")
    return ctx.op("Gelu", ctx.tensor(node.args[0]), approximate=approximate)


def _log1p(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    return ctx.op("Log", ctx.op("Add", ctx.tensor(node.args[0], dtype), ctx.tensor(1, dtype)))


def _expm1(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    return ctx.op("Sub", ctx.op("Exp", ctx.tensor(node.args[0], dtype)), ctx.tensor(1, dtype))


def _softplus(ctx: Context, node: fx.Node) -> ir.Value:
    """`log(1 + exp(beta * x)) / beta`, and `x` itself where `beta * x` is beyond the threshold."""
    source, beta, threshold = [*node.args, *(1.0, 20.0)[len(node.args) - 1 :]][:3]
    dtype, x = result_dtype(node), ctx.tensor(source)
    scaled = x if beta == 1 else ctx.op("Mul", x, ctx.tensor(beta, dtype))
    smooth = ctx.op("Softplus", scaled)
    smooth = smooth if beta == 1 else ctx.op("Div", smooth, ctx.tensor(beta, dtype))
    if real(threshold) >= 20:  # beyond 20 the two agree to the last bit of float32
        return smooth
    return ctx.op("Where", ctx.op("Greater", scaled, ctx.tensor(threshold, dtype)), x, smooth)


def _clamp(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    bounds = [*node.args[1:], None, None][:2]
    low = node.kwargs.get("min", bounds[0])
    high = node.kwargs.get("max", bounds[1])
    limits = [None if bound is None else ctx.tensor(bound, dtype) for bound in (low, high)]
    return ctx.op("Clip", ctx.tensor(node.args[0], dtype), *limits)


def _clamp_tensors(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    source, low, high = [*node.args, None][:3]
    value = ctx.tensor(source, dtype)
    if low is not None:
        value = ctx.op("Max", value, ctx.tensor(low, dtype))
    return value if high is None else ctx.op("Min", value, ctx.tensor(high, dtype))


def _clamp_min(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    return ctx.op("Max", ctx.tensor(node.args[0], dtype), ctx.tensor(node.args[1], dtype))


def _where(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    condition, yes, no = node.args[:3]
    return ctx.op("Where", ctx.tensor(condition), ctx.tensor(yes, dtype), ctx.tensor(no, dtype))


def _masked_fill(ctx: Context, node: fx.Node) -> ir.Value:
    x, mask, value = node.args[:3]
    dtype = result_dtype(node)
    return ctx.op("Where", ctx.tensor(mask, torch.bool), ctx.tensor(value, dtype), ctx.tensor(x, dtype))


def _cast(ctx: Context, node: fx.Node) -> ir.Value:
    return ctx.tensor(node.args[0], result_dtype(node))


def _identity(ctx: Context, node: fx.Node) -> Any:
    return ctx.get(node.args[0])


def _floor_divide(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    left, right = (ctx.tensor(argument, dtype) for argument in node.args[:2])
    if dtype.is_floating_point:
        return ctx.op("Floor", ctx.op("Div", left, right))
    # ONNX Div truncates; with Mod of Python's sign the difference divides exactly.
    return ctx.op("Div", ctx.op("Sub", left, ctx.op("Mod", left, right)), right)


def _divide_mode(ctx: Context, node: fx.Node) -> ir.Value:
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor":
        return _floor_divide(ctx, node)
    out = _binary("Div")(ctx, node)
    if mode == "trunc" and result_dtype(node).is_floating_point:
        return ctx.op("Mul", ctx.op("Sign", out), ctx.op("Floor", ctx.op("Abs", out)))
    return out  # type: ignore[no-any-return]


def _remainder(ctx: Context, node: fx.Node) -> ir.Value:
    """The remainder has the sign of the divisor, as in Python; ONNX's Mod knows that for whole numbers alone."""
    dtype = result_dtype(node)
    left, right = (ctx.tensor(argument, dtype) for argument in node.args[:2])
    if not dtype.is_floating_point:
        return ctx.op("Mod", left, right)
    return ctx.op("Sub", left, ctx.op("Mul", ctx.op("Floor", ctx.op("Div", left, right)), right))


def _zeros_like(ctx: Context, node: fx.Node) -> ir.Value:
    fill = {aten.zeros_like.default: 0, aten.ones_like.default: 1}.get(node.target)  # type: ignore[call-overload]
    value = np.asarray([node.args[1] if fill is None else fill], dtype=np_dtype(result_dtype(node)))
    return ctx.op("ConstantOfShape", ctx.op("Shape", ctx.tensor(node.args[0])), value=ir.Tensor(value))


def _bitwise(logical: str, bitwise: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> ir.Value:
        dtype = result_dtype(node)
        operands = [ctx.tensor(argument, dtype) for argument in node.args]
        return ctx.op(logical if dtype is torch.bool else bitwise, *operands)

    return lower


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
    aten.add.Tensor: _binary("Add"),
    aten.add.Scalar: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.sub.Scalar: _binary("Sub"),
    aten.rsub.Scalar: _reversed_subtract,
    aten.rsub.Tensor: _reversed_subtract,
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.div.Scalar: _binary("Div"),
    aten.div.Tensor_mode: _divide_mode,
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Scalar: _remainder,
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _base_power,
    aten.pow.Scalar: _base_power,
    aten.square.default: lambda ctx, node: ctx.op("Mul", ctx.tensor(node.args[0]), ctx.tensor(node.args[0])),
    aten.eq.Tensor: _compare("Equal"),
    aten.eq.Scalar: _compare("Equal"),
    aten.ne.Tensor: _compare("Equal", negate=True),
    aten.ne.Scalar: _compare("Equal", negate=True),
    aten.lt.Tensor: _compare("Less"),
    aten.lt.Scalar: _compare("Less"),
    aten.le.Tensor: _compare("LessOrEqual"),
    aten.le.Scalar: _compare("LessOrEqual"),
    aten.gt.Tensor: _compare("Greater"),
    aten.gt.Scalar: _compare("Greater"),
    aten.ge.Tensor: _compare("GreaterOrEqual"),
    aten.ge.Scalar: _compare("GreaterOrEqual"),
    aten.logical_and.default: _bitwise("And", "BitwiseAnd"),
    aten.logical_or.default: _bitwise("Or", "BitwiseOr"),
    aten.logical_not.default: lambda ctx, node: ctx.op("Not", ctx.tensor(node.args[0], torch.bool)),
    aten.bitwise_and.Tensor: _bitwise("And", "BitwiseAnd"),
    aten.bitwise_or.Tensor: _bitwise("Or", "BitwiseOr"),
    aten.bitwise_not.default: _bitwise("Not", "BitwiseNot"),
    aten.neg.default: _unary("Neg"),
    aten.abs.default: _unary("Abs"),
    aten.exp.default: _unary("Exp"),
    aten.expm1.default: _expm1,
    aten.log.default: _unary("Log"),
    aten.log1p.default: _log1p,
    aten.sqrt.default: _unary("Sqrt"),
    aten.rsqrt.default: _rsqrt,
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.floor.default: _unary("Floor"),
    aten.ceil.default: _unary("Ceil"),
    aten.round.default: _unary("Round"),
    aten.sign.default: _unary("Sign"),
    aten.cos.default: _unary("Cos"),
    aten.sin.default: _unary("Sin"),
    aten.tanh.default: _unary("Tanh"),
    aten.erf.default: _unary("Erf"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.relu.default: _unary("Relu"),
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp_tensors,
    aten.clamp_min.default: _clamp_min,
    aten.clamp_max.default: lambda ctx, node: ctx.op(
        "Min", ctx.tensor(node.args[0], result_dtype(node)), ctx.tensor(node.args[1], result_dtype(node))
    ),
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.type_as.default: _cast,
    aten.clone.default: _identity,
    aten.alias.default: _identity,
    aten.detach.default: _identity,
    aten.contiguous.default: _identity,
    aten.lift_fresh_copy.default: _identity,
    aten.dropout.default: _identity,
    aten.zeros_like.default: _zeros_like,
    aten.ones_like.default: _zeros_like,
    aten.full_like.default: _zeros_like,
    aten.sym_size.int: _sym_size,
    operator.add: _size_arithmetic("Add"),
    operator.neg: _size_arithmetic("Neg"),
    operator.sub: _size_arithmetic("Sub"),
    operator.mul: _size_arithmetic("Mul"),
    operator.floordiv: _size_arithmetic("Div"),
}
