"""Elementwise ops, comparisons and casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import is_tensor, result_dtype
from moec.targets.common.table import named
from moec.targets.coreml.context import MIL_NAMES, NUMPY, Context, Var

aten = torch.ops.aten
Lowering = Callable[[Context, fx.Node], Any]


UNARY: Mapping[Any, str] = named(
    "abs exp sqrt floor ceil round sign cos sin tanh erf sigmoid relu silu softplus logical_not"
)
"""Ops that are one MIL op of `x`."""

SAFE: Mapping[Any, str] = {aten.log.default: "log", aten.rsqrt.default: "rsqrt"}
"""The same, for MIL ops that add an `epsilon` to `x`, which is set to 0."""

BINARY: Mapping[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "real_div",
    aten.floor_divide.default: "floor_div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.pow.Tensor_Tensor: "pow",
    aten.eq.Tensor: "equal",
    aten.lt.Tensor: "less",
    aten.le.Tensor: "less_equal",
    aten.gt.Tensor: "greater",
    aten.ge.Tensor: "greater_equal",
    aten.logical_and.default: "logical_and",
    aten.logical_or.default: "logical_or",
}
"""Ops that are one MIL op of `x` and `y`."""


def _unary(op_type: str) -> Lowering:
    return lambda ctx, node: getattr(ctx.mb, op_type)(x=ctx.tensor(node.args[0]))


def _safe(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        return getattr(ctx.mb, op_type)(x=ctx.tensor(node.args[0]), epsilon=ctx.tensor(0.0, result_dtype(node)))

    return lower


def _binary(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        # A Python number among the operands is converted to the dtype of the result, in which the op computes.
        dtype = result_dtype(node)
        left, right = (ctx.tensor(item, None if is_tensor(item) else dtype) for item in node.args)
        return getattr(ctx.mb, op_type)(x=left, y=right)

    return lower


def _negate(ctx: Context, node: fx.Node) -> Var:
    return ctx.mb.mul(x=ctx.tensor(node.args[0]), y=ctx.tensor(-1, result_dtype(node)))


def _reciprocal(ctx: Context, node: fx.Node) -> Var:
    return ctx.mb.real_div(x=ctx.tensor(1.0, result_dtype(node)), y=ctx.tensor(node.args[0]))


def _gelu(ctx: Context, node: fx.Node) -> Var:
    mode = "TANH_APPROXIMATION" if node.kwargs.get("approximate", "none") == "tanh" else "EXACT"
    return ctx.mb.gelu(x=ctx.tensor(node.args[0]), mode=mode)


def _clamp(ctx: Context, node: fx.Node) -> Var:
    source, low, high = node.args
    value, dtype = ctx.tensor(source), result_dtype(node)
    if low is not None:
        value = ctx.mb.maximum(x=value, y=ctx.tensor(low, dtype))
    return value if high is None else ctx.mb.minimum(x=value, y=ctx.tensor(high, dtype))


def where(ctx: Context, condition: Var, yes: Var, no: Var, shape: tuple[Any, ...]) -> Var:
    """MIL's `select`. It infers the result's shape from `yes` and `no`, so one of them must have that `shape`."""
    if any(len(value.shape) == len(shape) and _covers(value.shape, shape) for value in (yes, no)):
        return ctx.mb.select(cond=condition, a=yes, b=no)
    # Adding zeros of the condition's shape broadcasts both; it leaves infinities unchanged.
    kind = ctx.type_name(no)
    zeros = ctx.mb.mul(x=ctx.mb.cast(x=condition, dtype=kind), y=ctx.constant(NUMPY[kind](0)))
    return ctx.mb.select(cond=condition, a=ctx.mb.add(x=zeros, y=yes), b=ctx.mb.add(x=zeros, y=no))


def _covers(have: Any, shape: tuple[Any, ...]) -> bool:
    """Whether no axis of `have` needs to be broadcast; symbolic sizes on both sides count as equal."""
    return all(
        not isinstance(new, int) or (isinstance(old, int | np.integer) and int(old) == new)
        for old, new in zip(have, shape, strict=True)
    ) and all(
        isinstance(new, int) or not isinstance(old, int | np.integer) for old, new in zip(have, shape, strict=True)
    )


def _where(ctx: Context, node: fx.Node) -> Var:
    condition, yes, no = node.args
    dtype, shape = result_dtype(node), tuple(node.meta["val"].shape)
    # `select` does not take booleans: they are cast to integers and back.
    carried = torch.int32 if dtype is torch.bool else dtype
    picked = where(ctx, ctx.tensor(condition), ctx.tensor(yes, carried), ctx.tensor(no, carried), shape)
    return ctx.cast(picked, MIL_NAMES[dtype])


TABLE: Mapping[Any, Lowering] = {
    **{op: _unary(op_type) for op, op_type in UNARY.items()},
    **{op: _safe(op_type) for op, op_type in SAFE.items()},
    **{op: _binary(op_type) for op, op_type in BINARY.items()},
    aten.neg.default: _negate,
    aten.reciprocal.default: _reciprocal,
    aten.gelu.default: _gelu,
    aten.clamp.default: _clamp,
    aten.where.self: _where,
}
