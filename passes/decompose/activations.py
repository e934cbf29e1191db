"""Functions of one tensor, composed of core ops."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from moec.passes.decompose.builder import Builder, Rule, Rules
from moec.passes.rewriting import aten


def _softplus(b: Builder, self: fx.Node, beta: Any = 1, threshold: Any = 20) -> fx.Node | None:
    """`log(1 + exp(beta * x)) / beta`, but `x` where `beta * x` exceeds the threshold."""
    if beta == 1 and threshold >= 20:  # above 20, both are equal in float32
        return None if b.node.args[1:] == (1, 20) else b(aten.softplus.default, self, 1, 20)
    scaled = b(aten.mul.Tensor, self, beta)
    smooth = b(aten.div.Tensor, b(aten.softplus.default, scaled, 1, 20), beta)
    beyond = b(aten.gt.Tensor, scaled, b.full([], threshold, b.dtype))
    return b(aten.where.self, beyond, self, smooth)


def _log_sigmoid(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.neg.default, b(aten.softplus.default, b(aten.neg.default, self), 1, 20))


def _expm1(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.sub.Tensor, b(aten.exp.default, b.cast(self, b.dtype)), 1)


def _log1p(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.log.default, b(aten.add.Tensor, b.cast(self, b.dtype), 1))


def _scaled_logarithm(base: float) -> Rule:
    return lambda b, self: b(aten.div.Tensor, b(aten.log.default, b.cast(self, b.dtype)), math.log(base))


def _exp2(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.exp.default, b(aten.mul.Tensor, b.cast(self, b.dtype), math.log(2)))


def _square(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.mul.Tensor, self, self)


def _hard_sigmoid(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.div.Tensor, b(aten.clamp.default, b(aten.add.Tensor, self, 3), 0, 6), 6)


def _hard_swish(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.mul.Tensor, self, _hard_sigmoid(b, self))


def _hard_tanh(b: Builder, self: fx.Node, min_val: Any = -1, max_val: Any = 1) -> fx.Node:
    return b(aten.clamp.default, self, min_val, max_val)


def _leaky_relu(b: Builder, self: fx.Node, negative_slope: Any = 0.01) -> fx.Node:
    zero = b.full([], 0, b.dtype)
    return b(aten.where.self, b(aten.gt.Tensor, self, zero), self, b(aten.mul.Tensor, self, negative_slope))


def _elu(b: Builder, self: fx.Node, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> fx.Node:
    zero = b.full([], 0, b.dtype)
    below = b(aten.mul.Tensor, _expm1(b, b(aten.mul.Tensor, self, input_scale)), alpha)
    chosen = b(aten.where.self, b(aten.gt.Tensor, self, zero), self, below)
    return b(aten.mul.Tensor, chosen, scale)


def _mish(b: Builder, self: fx.Node) -> fx.Node:
    return b(aten.mul.Tensor, self, b(aten.tanh.default, b(aten.softplus.default, self, 1, 20)))


def _in_result_dtype(op: Any) -> Rule:
    """A function that computes in the dtype of its result, also for integer inputs."""

    def rule(b: Builder, self: fx.Node, **keywords: Any) -> fx.Node | None:
        value = b.cast(self, b.dtype)
        return None if value is self else b(op, value, **keywords)

    return rule


_OF_FLOATS = ("exp", "log", "sqrt", "rsqrt", "reciprocal", "cos", "sin", "tanh", "sigmoid")

RULES: Rules = {
    **{getattr(aten, name).default: _in_result_dtype(getattr(aten, name).default) for name in _OF_FLOATS},
    aten.softplus.default: _softplus,
    aten.log_sigmoid_forward.default: lambda b, self: (_log_sigmoid(b, self), self),
    aten.log_sigmoid.default: _log_sigmoid,
    aten.expm1.default: _expm1,
    aten.log1p.default: _log1p,
    aten.log2.default: _scaled_logarithm(2),
    aten.log10.default: _scaled_logarithm(10),
    aten.exp2.default: _exp2,
    aten.square.default: _square,
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.hardswish.default: _hard_swish,
    aten.hardtanh.default: _hard_tanh,
    aten.relu6.default: lambda b, self: b(aten.clamp.default, self, 0, 6),
    aten.leaky_relu.default: _leaky_relu,
    aten.elu.default: _elu,
    aten.mish.default: _mish,
}
