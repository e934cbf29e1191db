"""Elementwise ops, comparisons and casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moec.targets.tflite.context import Context, result_dtype
from moec.targets.tflite.model import Value

aten = torch.ops.aten
Lowering = Callable[[Context, fx.Node], Any]


def _unary(name: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Value:
        return ctx.op(name, ctx.tensor(node.args[0], result_dtype(node)))

    return lower


def _operands(ctx: Context, node: fx.Node) -> tuple[Value, Value]:
    dtype = result_dtype(node)
    left, right = (ctx.tensor(argument, dtype) for argument in node.args[:2])
    if node.kwargs.get("alpha", 1) != 1:
        right = ctx.op("MUL", right, ctx.tensor(node.kwargs["alpha"], dtype))
    return left, right


def _binary(name: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Value:
        return ctx.op(name, *_operands(ctx, node))

    return lower


def _reversed_subtract(ctx: Context, node: fx.Node) -> Value:
    left, right = _operands(ctx, node)
    return ctx.op("SUB", right, left)


def _compare(name: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Value:
        left, right = node.args[:2]
        dtypes = [a.meta["val"].dtype for a in (left, right) if isinstance(a, fx.Node)]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        if isinstance(right, float) and not dtype.is_floating_point:
            dtype = torch.float32
        if dtype is torch.bool and name not in ("EQUAL", "NOT_EQUAL"):
            dtype = torch.int64
        return ctx.op(name, ctx.tensor(left, dtype), ctx.tensor(right, dtype), dtype="BOOL")

    return lower


def _power(ctx: Context, node: fx.Node) -> Value:
    base, exponent = ctx.tensor(node.args[0], result_dtype(node)), node.args[1]
    if exponent == 2:
        return ctx.op("MUL", base, base)
    if exponent == 0.5:
        return ctx.op("SQRT", base)
    return ctx.op("POW", base, ctx.tensor(exponent, result_dtype(node)))


def _square(ctx: Context, node: fx.Node) -> Value:
    x = ctx.tensor(node.args[0])
    return ctx.op("MUL", x, x)


def _reciprocal(ctx: Context, node: fx.Node) -> Value:
    return ctx.op("DIV", ctx.scalar(1.0), ctx.tensor(node.args[0]))


def _silu(ctx: Context, node: fx.Node) -> Value:
    x = ctx.tensor(node.args[0])
    return ctx.op("MUL", x, ctx.op("LOGISTIC", x))


def _gelu(ctx: Context, node: fx.Node) -> Value:
    return ctx.op("GELU", ctx.tensor(node.args[0]), approximate=node.kwargs.get("approximate", "none") == "tanh")


def _log1p(ctx: Context, node: fx.Node) -> Value:
    return ctx.op("LOG", ctx.op("ADD", ctx.tensor(node.args[0]), ctx.scalar(1.0)))


def _expm1(ctx: Context, node: fx.Node) -> Value:
    return ctx.op("SUB", ctx.op("EXP", ctx.tensor(node.args[0])), ctx.scalar(1.0))


def _softplus(ctx: Context, node: fx.Node) -> Value:
    """log(1 + e^x) as max(x, 0) + log(1 + e^-|x|), which never overflows."""
    beta = node.args[1] if len(node.args) > 1 else 1
    if beta != 1:
        raise ctx.refuse(node, f"softplus with beta {beta} has no form")
    x = ctx.tensor(node.args[0])
    small = ctx.op("EXP", ctx.op("NEG", ctx.op("ABS", x)))
    return ctx.op("ADD", ctx.op("RELU", x), ctx.op("LOG", ctx.op("ADD", small, ctx.scalar(1.0))))


def _clamp(ctx: Context, node: fx.Node) -> Value:
    bounds = [*node.args[1:], None, None][:2]
    low, high = node.kwargs.get("min", bounds[0]), node.kwargs.get("max", bounds[1])
    return _between(ctx, node, low, high)


def _clamp_min(ctx: Context, node: fx.Node) -> Value:
    return _between(ctx, node, node.args[1], None)


def _clamp_max(ctx: Context, node: fx.Node) -> Value:
    return _between(ctx, node, None, node.args[1])


def _between(ctx: Context, node: fx.Node, low: Any, high: Any) -> Value:
    dtype = result_dtype(node)
    value = ctx.tensor(node.args[0], dtype)
    if low is not None:
        value = ctx.op("MAXIMUM", value, ctx.tensor(low, dtype))
    return value if high is None else ctx.op("MINIMUM", value, ctx.tensor(high, dtype))


def choose(ctx: Context, condition: Value, yes: Value, no: Value) -> Value:
    """`yes` where `condition`, else `no`; all broadcast."""
    return ctx.op(
        "SELECT_V2",
        condition,
        yes,
        no,
        dtype=yes.dtype,
    )


def _where(ctx: Context, node: fx.Node) -> Value:
    dtype = result_dtype(node)
    condition, yes, no = node.args[:3]
    return choose(ctx, ctx.tensor(condition), ctx.tensor(yes, dtype), ctx.tensor(no, dtype))


def _masked_fill(ctx: Context, node: fx.Node) -> Value:
    x, mask, value = node.args[:3]
    dtype = result_dtype(node)
    return choose(ctx, ctx.tensor(mask, torch.bool), ctx.tensor(value, dtype), ctx.tensor(x, dtype))


def _cast(ctx: Context, node: fx.Node) -> Value:
    """A change of dtype; from float to integer CAST rounds toward zero, as torch does."""
    return ctx.tensor(node.args[0], result_dtype(node))


def _identity(ctx: Context, node: fx.Node) -> Any:
    return ctx.get(node.args[0])


def _divide(ctx: Context, node: fx.Node) -> Value:
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor":
        return ctx.op("FLOOR_DIV", *_operands(ctx, node))
    if mode == "trunc" and result_dtype(node).is_floating_point:
        raise ctx.refuse(node, "division rounded toward zero of floats has no form")
    return ctx.op("DIV", *_operands(ctx, node))


def _logical(name: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Value:
        if result_dtype(node) is not torch.bool:
            raise ctx.refuse(node, "bitwise operations on integers have no form")
        return ctx.op(name, *(ctx.tensor(argument, torch.bool) for argument in node.args))

    return lower


def _filled_like(ctx: Context, node: fx.Node) -> torch.Tensor:  # noqa: ARG001 -- every lowering takes both
    fake = node.meta["val"]
    fills = {aten.zeros_like.default: 0, aten.ones_like.default: 1}
    fill = fills.get(node.target, node.args[1] if len(node.args) > 1 else 0)  # type: ignore[call-overload]
    return torch.full(tuple(fake.shape), fill, dtype=fake.dtype)


TABLE: Mapping[Any, Lowering] = {
    aten.add.Tensor: _binary("ADD"),
    aten.add.Scalar: _binary("ADD"),
    aten.sub.Tensor: _binary("SUB"),
    aten.sub.Scalar: _binary("SUB"),
    aten.rsub.Scalar: _reversed_subtract,
    aten.rsub.Tensor: _reversed_subtract,
    aten.mul.Tensor: _binary("MUL"),
    aten.mul.Scalar: _binary("MUL"),
    aten.div.Tensor: _divide,
    aten.div.Scalar: _divide,
    aten.div.Tensor_mode: _divide,
    aten.floor_divide.default: _binary("FLOOR_DIV"),
    aten.remainder.Scalar: _binary("FLOOR_MOD"),
    aten.maximum.default: _binary("MAXIMUM"),
    aten.minimum.default: _binary("MINIMUM"),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _binary("POW"),
    aten.pow.Scalar: _binary("POW"),
    aten.square.default: _square,
    aten.eq.Tensor: _compare("EQUAL"),
    aten.eq.Scalar: _compare("EQUAL"),
    aten.ne.Tensor: _compare("NOT_EQUAL"),
    aten.ne.Scalar: _compare("NOT_EQUAL"),
    aten.lt.Tensor: _compare("LESS"),
    aten.lt.Scalar: _compare("LESS"),
    aten.le.Tensor: _compare("LESS_EQUAL"),
    aten.le.Scalar: _compare("LESS_EQUAL"),
    aten.gt.Tensor: _compare("GREATER"),
    aten.gt.Scalar: _compare("GREATER"),
    aten.ge.Tensor: _compare("GREATER_EQUAL"),
    aten.ge.Scalar: _compare("GREATER_EQUAL"),
    aten.logical_and.default: _logical("LOGICAL_AND"),
    aten.logical_or.default: _logical("LOGICAL_OR"),
    aten.logical_not.default: lambda ctx, node: ctx.op("LOGICAL_NOT", ctx.tensor(node.args[0], torch.bool)),
    aten.bitwise_and.Tensor: _logical("LOGICAL_AND"),
    aten.bitwise_or.Tensor: _logical("LOGICAL_OR"),
    aten.bitwise_not.default: _logical("LOGICAL_NOT"),
    aten.neg.default: _unary("NEG"),
    aten.abs.default: _unary("ABS"),
    aten.exp.default: _unary("EXP"),
    aten.expm1.default: _expm1,
    aten.log.default: _unary("LOG"),
    aten.log1p.default: _log1p,
    aten.sqrt.default: _unary("SQRT"),
    aten.rsqrt.default: _unary("RSQRT"),
    aten.reciprocal.default: _reciprocal,
    aten.floor.default: _unary("FLOOR"),
    aten.ceil.default: _unary("CEIL"),
    aten.round.default: _unary("ROUND"),
    aten.sign.default: _unary("SIGN"),
    aten.cos.default: _unary("COS"),
    aten.sin.default: _unary("SIN"),
    aten.tanh.default: _unary("TANH"),
    aten.sigmoid.default: _unary("LOGISTIC"),
    aten.relu.default: _unary("RELU"),
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp_min,
    aten.clamp_max.default: _clamp_max,
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
    aten.zeros_like.default: _filled_like,
    aten.ones_like.default: _filled_like,
    aten.full_like.default: _filled_like,
}
