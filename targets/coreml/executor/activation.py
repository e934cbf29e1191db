"""Kernels of activation functions and softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import erf, expit

from moec.targets.coreml.executor.kernel import Args, Kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.targets.coreml.executor.dtypes import Array


def _unary(function: Callable[[Array], Array]) -> Kernel:
    return Kernel(lambda args: function(args.array("x")))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow; shape and type of `x`."""
    result: Array = expit(x)
    return result


def softmax(x: Array, axis: int) -> Array:
    """Softmax along `axis`; shape and type of `x`."""
    shifted = np.exp(x - x.max(axis=axis, keepdims=True))
    result: Array = shifted / shifted.sum(axis=axis, keepdims=True)
    return result


def _gelu(args: Args) -> Array:
    x = args.array("x")
    mode = args.text("mode", "EXACT")
    if mode == "EXACT":
        exact: Array = 0.5 * x * (1.0 + erf(x * float(np.sqrt(0.5))))
        return exact
    if mode == "TANH_APPROXIMATION":
        approximate: Array = 0.5 * x * (1.0 + np.tanh(float(np.sqrt(2 / np.pi)) * (x + 0.044715 * x * x * x)))
        return approximate
    if mode == "SIGMOID_APPROXIMATION":
        logistic: Array = x * sigmoid(1.702 * x)
        return logistic
    raise ValueError(f"unknown gelu mode {mode!r}")


def _alpha(function: Callable[[Array, float], Array]) -> Kernel:
    return Kernel(lambda args: function(args.array("x"), args.number("alpha", 1.0)))


def _clamped_relu(args: Args) -> Array:
    x, alpha, beta = args.array("x"), args.number("alpha", 0.0), args.number("beta", 0.0)
    clamped: Array = np.minimum(np.where(x >= 0, x, alpha * x), x.dtype.type(beta))
    return clamped


KERNELS: dict[str, Kernel] = {
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "relu6": _unary(lambda x: np.clip(x, 0, 6)),
    "sigmoid": _unary(sigmoid),
    "silu": _unary(lambda x: x * sigmoid(x)),
    "softplus": _unary(lambda x: np.logaddexp(x, x.dtype.type(0))),
    "leaky_relu": _alpha(lambda x, alpha: np.where(x >= 0, x, alpha * x)),
    "elu": _alpha(lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(x))),
    "clamped_relu": Kernel(_clamped_relu),
    "gelu": Kernel(_gelu),
    "softmax": Kernel(lambda args: softmax(args.array("x"), args.integer("axis", -1))),
}
