"""Elementwise ops, comparisons and casts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.coreml.context import MIL_NAMES, NUMPY, Context, Var, integer, result_dtype

aten = torch.ops.aten
Lowering = Callable[[Context, fx.Node], Any]


def _unary(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        return getattr(ctx.mb, op_type)(x=ctx.tensor(node.args[0], result_dtype(node)))

    return lower


def _safe(op_type: str) -> Lowering:
    """An op to whose operand MIL would add a small number."""

    def lower(ctx: Context, node: fx.Node) -> Var:
        dtype = result_dtype(node)
        return getattr(ctx.mb, op_type)(x=ctx.tensor(node.args[0], dtype), epsilon=ctx.tensor(0.0, dtype))

    return lower


def _binary(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        dtype = result_dtype(node)
        left, right = (ctx.tensor(argument, dtype) for argument in node.args[:2])
        if node.kwargs.get("alpha", 1) != 1:
            right = ctx.mb.mul(x=right, y=ctx.tensor(node.kwargs["alpha"], dtype))
        return getattr(ctx.mb, op_type)(x=left, y=right)

    return lower


def _reversed_subtract(ctx: Context, node: fx.Node) -> Var:
    dtype = result_dtype(node)
    return ctx.mb.sub(x=ctx.tensor(node.args[1], dtype), y=ctx.tensor(node.args[0], dtype))


def _negate(ctx: Context, node: fx.Node) -> Var:
    dtype = result_dtype(node)
    return ctx.mb.mul(x=ctx.tensor(node.args[0], dtype), y=ctx.tensor(-1, dtype))


def _reciprocal(ctx: Context, node: fx.Node) -> Var:
    dtype = result_dtype(node)
    return ctx.mb.real_div(x=ctx.tensor(1.0, dtype), y=ctx.tensor(node.args[0], dtype))


def _compare(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        left, right = node.args[:2]
        dtypes = [a.meta["val"].dtype for a in (left, right) if isinstance(a, fx.Node)]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        if isinstance(right, float) and not dtype.is_floating_point:
            dtype = torch.float32
        if dtype is torch.bool:
            dtype = torch.int32
        return getattr(ctx.mb, op_type)(x=ctx.tensor(left, dtype), y=ctx.tensor(right, dtype))

    return lower


def _power(ctx: Context, node: fx.Node) -> Var:
    dtype = result_dtype(node)
    base, exponent = ctx.tensor(node.args[0], dtype), node.args[1]
    if exponent == 2:
        return ctx.mb.mul(x=base, y=base)
    if exponent == 0.5:
        return ctx.mb.sqrt(x=base)
    return ctx.mb.pow(x=base, y=ctx.tensor(exponent, dtype))


def _square(ctx: Context, node: fx.Node) -> Var:
    value = ctx.tensor(node.args[0])
    return ctx.mb.mul(x=value, y=value)


def _gelu(ctx: Context, node: fx.Node) -> Var:
    mode = "TANH_APPROXIMATION" if node.kwargs.get("approximate", "none") == "tanh" else "EXACT"
    return ctx.mb.gelu(x=ctx.tensor(node.args[0]), mode=mode)


def _log1p(ctx: Context, node: fx.Node) -> Var:
    dtype = result_dtype(node)
    total = ctx.mb.add(x=ctx.tensor(node.args[0], dtype), y=ctx.tensor(1.0, dtype))
    return ctx.mb.log(x=total, epsilon=ctx.tensor(0.0, dtype))


def _expm1(ctx: Context, node: fx.Node) -> Var:
    dtype = result_dtype(node)
    return ctx.mb.sub(x=ctx.mb.exp(x=ctx.tensor(node.args[0], dtype)), y=ctx.tensor(1.0, dtype))


def _bounded(ctx: Context, node: fx.Node, low: Any, high: Any) -> Var:
    dtype = result_dtype(node)
    value = ctx.tensor(node.args[0], dtype)
    if low is not None:
        value = ctx.mb.maximum(x=value, y=ctx.tensor(low, dtype))
    return value if high is None else ctx.mb.minimum(x=value, y=ctx.tensor(high, dtype))


def _clamp(ctx: Context, node: fx.Node) -> Var:
    low, high = [*node.args[1:], None, None][:2]
    return _bounded(ctx, node, node.kwargs.get("min", low), node.kwargs.get("max", high))


def where(ctx: Context, condition: Var, yes: Var, no: Var, shape: tuple[Any, ...]) -> Var:
    """`select`. MIL infers the shape of the result from the two values alone: one of them must have all of it."""
    if any(len(value.shape) == len(shape) and _covers(value.shape, shape) for value in (yes, no)):
        return ctx.mb.select(cond=condition, a=yes, b=no)
    # Zeros of the condition's shape: float arithmetic with it must not touch infinities.
    kind = ctx.type_name(no)
    zeros = ctx.mb.mul(x=ctx.mb.cast(x=condition, dtype=kind), y=ctx.constant(NUMPY[kind](0)))
    return ctx.mb.select(cond=condition, a=ctx.mb.add(x=zeros, y=yes), b=ctx.mb.add(x=zeros, y=no))


def _covers(have: Any, shape: tuple[Any, ...]) -> bool:
    """Whether no axis is broadcast; a symbolic size on both sides is one and the same axis."""
    return all(
        not isinstance(new, int) or (isinstance(old, int | np.integer) and int(old) == new)
        for old, new in zip(have, shape, strict=True)
    ) and all(
        isinstance(new, int) or not isinstance(old, int | np.integer) for old, new in zip(have, shape, strict=True)
    )


def _where(ctx: Context, node: fx.Node) -> Var:
    condition, yes, no = node.args[:3]
    return _select(ctx, node, condition, yes, no)


def _masked_fill(ctx: Context, node: fx.Node) -> Var:
    x, mask, value = node.args[:3]
    return _select(ctx, node, mask, value, x)


def _select(ctx: Context, node: fx.Node, condition: Any, yes: Any, no: Any) -> Var:
    dtype, shape = result_dtype(node), tuple(node.meta["val"].shape)
    if dtype is torch.bool:
        picked = where(
            ctx,
            ctx.tensor(condition, torch.bool),
            ctx.tensor(yes, torch.int32),
            ctx.tensor(no, torch.int32),
            shape,
        )
        return ctx.cast(picked, "bool")
    return where(ctx, ctx.tensor(condition, torch.bool), ctx.tensor(yes, dtype), ctx.tensor(no, dtype), shape)


def _cast(ctx: Context, node: fx.Node) -> Var:
    return ctx.tensor(node.args[0], result_dtype(node))


def _identity(ctx: Context, node: fx.Node) -> Any:
    return ctx.get(node.args[0])


def _divide_mode(ctx: Context, node: fx.Node) -> Var:
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor":
        return _binary("floor_div")(ctx, node)
    if mode == "trunc" and result_dtype(node).is_floating_point:
        raise ctx.refuse(node, "division rounded toward zero of floats has no form")
    return _binary("real_div")(ctx, node)


def _filled_like(ctx: Context, node: fx.Node) -> Var:
    fills: Mapping[Any, int] = {aten.zeros_like.default: 0, aten.ones_like.default: 1}
    fill = fills[node.target] if node.target in fills else node.args[1]
    name = MIL_NAMES[result_dtype(node)]
    kind = "int32" if name == "bool" else name
    value = ctx.mb.fill_like(ref_tensor=ctx.tensor(node.args[0]), value=NUMPY[kind](fill))
    return ctx.cast(value, name)


def _logical(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        if result_dtype(node) is not torch.bool:
            raise ctx.refuse(node, "bitwise arithmetic on integers has no form")
        left, right = (ctx.tensor(argument, torch.bool) for argument in node.args[:2])
        return getattr(ctx.mb, op_type)(x=left, y=right)

    return lower


def _logical_not(ctx: Context, node: fx.Node) -> Var:
    if result_dtype(node) is not torch.bool:
        raise ctx.refuse(node, "bitwise arithmetic on integers has no form")
    return ctx.mb.logical_not(x=ctx.tensor(node.args[0], torch.bool))


def _size_arithmetic(op_type: str) -> Lowering:
    """Arithmetic on sizes, on a single one from 0: lazy, since most of it is never asked for."""

    def lower(ctx: Context, node: fx.Node) -> Callable[[], Var]:
        def make() -> Var:
            left, right = (ctx.size(argument) for argument in (0, *node.args)[-2:])
            return getattr(ctx.mb, op_type)(x=left, y=right)

        return lambda: ctx.shared(("size", str(node.meta["val"])), make)

    return lower


def _sym_size(ctx: Context, node: fx.Node) -> Callable[[], Var]:
    source, axis = node.args
    assert isinstance(source, fx.Node)
    return lambda: ctx.axis_length(source, integer(axis))


TABLE: Mapping[Any, Lowering] = {
    aten.add.Tensor: _binary("add"),
    aten.add.Scalar: _binary("add"),
    aten.sub.Tensor: _binary("sub"),
    aten.sub.Scalar: _binary("sub"),
    aten.rsub.Scalar: _reversed_subtract,
    aten.rsub.Tensor: _reversed_subtract,
    aten.mul.Tensor: _binary("mul"),
    aten.mul.Scalar: _binary("mul"),
    aten.div.Tensor: _binary("real_div"),
    aten.div.Scalar: _binary("real_div"),
    aten.div.Tensor_mode: _divide_mode,
    aten.floor_divide.default: _binary("floor_div"),
    aten.remainder.Scalar: _binary("mod"),
    aten.maximum.default: _binary("maximum"),
    aten.minimum.default: _binary("minimum"),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _binary("pow"),
    aten.pow.Scalar: _binary("pow"),
    aten.square.default: _square,
    aten.eq.Tensor: _compare("equal"),
    aten.eq.Scalar: _compare("equal"),
    aten.ne.Tensor: _compare("not_equal"),
    aten.ne.Scalar: _compare("not_equal"),
    aten.lt.Tensor: _compare("less"),
    aten.lt.Scalar: _compare("less"),
    aten.le.Tensor: _compare("less_equal"),
    aten.le.Scalar: _compare("less_equal"),
    aten.gt.Tensor: _compare("greater"),
    aten.gt.Scalar: _compare("greater"),
    aten.ge.Tensor: _compare("greater_equal"),
    aten.ge.Scalar: _compare("greater_equal"),
    aten.logical_and.default: _logical("logical_and"),
    aten.logical_or.default: _logical("logical_or"),
    aten.logical_not.default: _logical_not,
    aten.bitwise_and.Tensor: _logical("logical_and"),
    aten.bitwise_or.Tensor: _logical("logical_or"),
    aten.bitwise_not.default: _logical_not,
    aten.neg.default: _negate,
    aten.abs.default: _unary("abs"),
    aten.exp.default: _unary("exp"),
    aten.expm1.default: _expm1,
    aten.log.default: _safe("log"),
    aten.log1p.default: _log1p,
    aten.sqrt.default: _unary("sqrt"),
    aten.rsqrt.default: _safe("rsqrt"),
    aten.reciprocal.default: _reciprocal,
    aten.floor.default: _unary("floor"),
    aten.ceil.default: _unary("ceil"),
    aten.round.default: _unary("round"),
    aten.sign.default: _unary("sign"),
    aten.cos.default: _unary("cos"),
    aten.sin.default: _unary("sin"),
    aten.tanh.default: _unary("tanh"),
    aten.erf.default: _unary("erf"),
    aten.sigmoid.default: _unary("sigmoid"),
    aten.relu.default: _unary("relu"),
    aten.silu.default: _unary("silu"),
    aten.gelu.default: _gelu,
    aten.softplus.default: _unary("softplus"),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: lambda ctx, node: _bounded(ctx, node, node.args[1], None),
    aten.clamp_max.default: lambda ctx, node: _bounded(ctx, node, None, node.args[1]),
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
    aten.sym_size.int: _sym_size,
    operator.add: _size_arithmetic("add"),
    operator.sub: _size_arithmetic("sub"),
    operator.neg: _size_arithmetic("sub"),
    operator.mul: _size_arithmetic("mul"),
    operator.floordiv: _size_arithmetic("floor_div"),
}
