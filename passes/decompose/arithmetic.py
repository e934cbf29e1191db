"""Element-wise arithmetic, comparisons, logic and choices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.stages import BINARY, NUMBERS
from moec.passes.decompose.builder import Builder, Rule, Rules
from moec.passes.rewriting import aten

COMPARISONS = {name: getattr(aten, name) for name in ("eq", "lt", "le", "gt", "ge")}


def _binary(b: Builder, op: Any, self: Any, other: Any, dtype: torch.dtype) -> fx.Node | None:
    """A binary core op that computes in `dtype`; None if the node already is one."""
    convert = b.cast if op in NUMBERS else b.tensor
    left, right = convert(self, dtype), convert(other, dtype)
    if b.node.target is op and left is self and right is other and not b.node.kwargs:
        return None
    return b(op, left, right)


def _plain(op: Any) -> Rule:
    def rule(b: Builder, self: Any, other: Any) -> fx.Node | None:
        return _binary(b, op, self, other, b.dtype)

    return rule


def _scaled(op: Any, *, swap: bool = False) -> Rule:
    """`self + alpha * other` or `self - alpha * other`; with `swap`, the operands are exchanged."""

    def rule(b: Builder, self: Any, other: Any, alpha: Any = 1) -> fx.Node | None:
        if swap:
            self, other = other, (self if alpha == 1 else b(aten.mul.Tensor, b.cast(self, b.dtype), alpha))
        elif alpha != 1:
            other = b(aten.mul.Tensor, b.cast(other, b.dtype), alpha) if isinstance(other, fx.Node) else alpha * other
        return _binary(b, op, self, other, b.dtype)

    return rule


def _divide_mode(b: Builder, self: Any, other: Any, rounding_mode: str | None = None) -> fx.Node | None:
    if rounding_mode is None:
        return _binary(b, aten.div.Tensor, self, other, b.dtype)
    if rounding_mode == "floor":
        return _binary(b, aten.floor_divide.default, self, other, b.dtype)
    # Rounding towards zero: the floored quotient of the magnitudes, with the sign of the quotient.
    left, right = b.tensor(self, b.dtype), b.tensor(other, b.dtype)
    magnitude = b(aten.floor_divide.default, b(aten.abs.default, left), b(aten.abs.default, right))
    sign = b(aten.mul.Tensor, b(aten.sign.default, left), b(aten.sign.default, right))
    return b(aten.mul.Tensor, sign, magnitude)


def _remainder(b: Builder, self: Any, other: Any) -> fx.Node:
    """The remainder has the sign of the divisor, as in Python."""
    left, right = b.cast(self, b.dtype), b.cast(other, b.dtype)
    whole = b(aten.mul.Tensor, b(aten.floor_divide.default, left, right), right)
    return b(aten.sub.Tensor, left, whole)


def _compare(name: str) -> Rule:
    def rule(b: Builder, self: Any, other: Any) -> fx.Node | None:
        return _binary(b, COMPARISONS[name].Tensor, self, other, _compared_in(self, other))

    return rule


def _not_equal(b: Builder, self: Any, other: Any) -> fx.Node:
    dtype = _compared_in(self, other)
    return b(aten.logical_not.default, b(aten.eq.Tensor, b.tensor(self, dtype), b.tensor(other, dtype)))


def _compared_in(self: Any, other: Any) -> torch.dtype:
    """Dtype in which torch compares; integers for bools, since not every runtime can order bools."""
    dtype = torch.result_type(*(_sample(side) for side in (self, other)))
    return torch.int32 if dtype == torch.bool else dtype


def _sample(side: Any) -> Any:
    """A tensor or number of the dtype of an operand; a symbolic size counts as an integer."""
    value = side.meta["val"] if isinstance(side, fx.Node) else side
    return value if isinstance(value, torch.Tensor | bool | int | float) else 1


def _truth(b: Builder, value: Any) -> fx.Node:
    """Whether each element is not 0."""
    if not isinstance(value, fx.Node):
        return b.full([], bool(value), torch.bool)
    dtype = value.meta["val"].dtype
    if dtype == torch.bool:
        return value
    return b(aten.logical_not.default, b(aten.eq.Tensor, value, b.full([], 0, dtype)))


def _logical(op: Any) -> Rule:
    def rule(b: Builder, self: Any, other: Any) -> fx.Node | None:
        left, right = _truth(b, self), _truth(b, other)
        return None if b.node.target is op and left is self and right is other else b(op, left, right)

    return rule


def _logical_not(b: Builder, self: fx.Node) -> fx.Node | None:
    truth = _truth(b, self)
    return None if truth is self else b(aten.logical_not.default, truth)


def _logical_xor(b: Builder, self: fx.Node, other: Any) -> fx.Node:
    left, right = (b.cast(_truth(b, side), torch.int32) for side in (self, other))
    return b(aten.logical_not.default, b(aten.eq.Tensor, left, right))


def _of_bools(rule: Rule) -> Rule:
    """`rule` if the op works on bools; a bitwise op on integers is not decomposed."""

    def chosen(b: Builder, self: Any, other: Any = None) -> Any:
        if b.dtype != torch.bool:
            return None
        return rule(b, self) if other is None else rule(b, self, other)

    return chosen


def _power(b: Builder, self: Any, exponent: Any) -> fx.Node:
    base = b.tensor(self, b.dtype)
    if isinstance(exponent, fx.Node) or exponent not in _POWERS:
        return b(aten.pow.Tensor_Tensor, base, b.tensor(exponent, b.dtype))
    found: fx.Node = _POWERS[exponent](b, base)
    return found


def _cube(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.mul.Tensor, b(aten.mul.Tensor, x, x), x)


_POWERS: dict[float, Any] = {
    -1: lambda b, x: b(aten.reciprocal.default, x),
    -0.5: lambda b, x: b(aten.rsqrt.default, x),
    0.5: lambda b, x: b(aten.sqrt.default, x),
    1: lambda _, x: x,
    2: lambda b, x: b(aten.mul.Tensor, x, x),
    3: _cube,
}


def _power_of_tensors(b: Builder, self: fx.Node, exponent: fx.Node) -> fx.Node | None:
    return _binary(b, aten.pow.Tensor_Tensor, self, exponent, b.dtype)


def _clamp(b: Builder, self: fx.Node, min: Any = None, max: Any = None) -> fx.Node | None:  # noqa: A002
    """A clamp with tensors as bounds becomes a maximum and a minimum."""
    bounds = (min, max)
    if not any(isinstance(bound, fx.Node) for bound in bounds):
        value = b.cast(self, b.dtype)
        done = b.node.target is aten.clamp.default and value is self
        return None if done else b(aten.clamp.default, value, *bounds)
    value = b.cast(self, b.dtype)
    if min is not None:
        value = b(aten.maximum.default, value, b.tensor(min, b.dtype))
    return value if max is None else b(aten.minimum.default, value, b.tensor(max, b.dtype))


def _clamp_max(b: Builder, self: fx.Node, max: Any) -> fx.Node | None:  # noqa: A002
    return _clamp(b, self, None, max)


def _where(b: Builder, condition: fx.Node, self: Any, other: Any) -> fx.Node | None:
    chosen, yes, no = _truth(b, condition), b.tensor(self, b.dtype), b.tensor(other, b.dtype)
    if b.node.target is aten.where.self and (chosen, yes, no) == (condition, self, other):
        return None
    return b(aten.where.self, chosen, yes, no)


def _masked_fill(b: Builder, self: fx.Node, mask: fx.Node, value: Any) -> fx.Node:
    return b(aten.where.self, _truth(b, mask), b.tensor(value, b.dtype), b.cast(self, b.dtype))


def _is_nan(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.logical_not.default, b(aten.eq.Tensor, self, self))


def _is_infinite(b: Builder, self: fx.Node) -> fx.Node:
    infinity = b.full([], math.inf, self.meta["val"].dtype)
    return b(aten.eq.Tensor, b(aten.abs.default, self), infinity)


RULES: Rules = {
    **{op: _plain(op) for op in BINARY if op not in {overload.Tensor for overload in COMPARISONS.values()}},
    **{getattr(packet, form): _compare(name) for name, packet in COMPARISONS.items() for form in ("Tensor", "Scalar")},
    aten.ne.Tensor: _not_equal,
    aten.ne.Scalar: _not_equal,
    aten.add.Tensor: _scaled(aten.add.Tensor),
    aten.add.Scalar: _scaled(aten.add.Tensor),
    aten.sub.Tensor: _scaled(aten.sub.Tensor),
    aten.sub.Scalar: _scaled(aten.sub.Tensor),
    aten.rsub.Tensor: _scaled(aten.sub.Tensor, swap=True),
    aten.rsub.Scalar: _scaled(aten.sub.Tensor, swap=True),
    aten.mul.Scalar: _plain(aten.mul.Tensor),
    aten.div.Scalar: _plain(aten.div.Tensor),
    aten.div.Tensor_mode: _divide_mode,
    aten.div.Scalar_mode: _divide_mode,
    aten.floor_divide.Scalar: _plain(aten.floor_divide.default),
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Scalar: _power,
    aten.pow.Tensor_Tensor: _power_of_tensors,
    aten.logical_and.default: _logical(aten.logical_and.default),
    aten.logical_or.default: _logical(aten.logical_or.default),
    aten.logical_not.default: _logical_not,
    aten.logical_xor.default: _logical_xor,
    aten.bitwise_and.Tensor: _of_bools(_logical(aten.logical_and.default)),
    aten.bitwise_or.Tensor: _of_bools(_logical(aten.logical_or.default)),
    aten.bitwise_xor.Tensor: _of_bools(_logical_xor),
    aten.bitwise_not.default: _of_bools(lambda b, self: b(aten.logical_not.default, self)),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_min.Tensor: _clamp,
    aten.clamp_max.default: _clamp_max,
    aten.clamp_max.Tensor: _clamp_max,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.isnan.default: _is_nan,
    aten.isinf.default: _is_infinite,
}
