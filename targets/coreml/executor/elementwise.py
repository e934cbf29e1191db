"""Kernels of element-wise ops: arithmetic, comparison, logic, rounding and type conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import erf

from moec.targets.coreml.executor.dtypes import BY_NAME, Array
from moec.targets.coreml.executor.kernel import Args, Kernel

if TYPE_CHECKING:
    from collections.abc import Callable


def _unary(function: Callable[[Any], Any]) -> Kernel:
    return Kernel(lambda args: function(args.array("x")))


def _binary(function: Callable[[Any, Any], Any]) -> Kernel:
    return Kernel(lambda args: function(args.array("x"), args.array("y")))


def _real_div(x: Array, y: Array) -> Array:
    if x.dtype.kind == "f":
        return x / y
    return np.trunc(np.true_divide(x, y))


def _cast(args: Args) -> Array:
    name = args.text("dtype", "")
    if name not in BY_NAME:
        raise ValueError(f"cannot cast to {name!r}")
    return args.array("x").astype(BY_NAME[name].numpy)


def _select(args: Args) -> Array:
    return np.where(args.array("cond"), args.array("a"), args.array("b"))


def _clip(args: Args) -> Array:
    return np.minimum(np.maximum(args.array("x"), args.array("alpha")), args.array("beta"))


def _rsqrt(args: Args) -> Array:
    x = args.array("x")
    result: Array = 1.0 / np.sqrt(x + x.dtype.type(args.number("epsilon", 1e-12)))
    return result


def _inverse(args: Args) -> Array:
    x = args.array("x")
    result: Array = 1.0 / (x + x.dtype.type(args.number("epsilon", 1e-4)))
    return result


def _log(args: Args) -> Array:
    x = args.array("x")
    result: Array = np.log(x + x.dtype.type(args.number("epsilon", 1e-45)))
    return result


def _threshold(args: Args) -> Array:
    return np.maximum(args.array("x"), args.array("alpha"))


_UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": erf,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "round": np.round,
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
    "logical_not": np.logical_not,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "real_div": _real_div,
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}

KERNELS: dict[str, Kernel] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    "identity": Kernel(lambda args: args.array("x"), widen=False),
    "cast": Kernel(_cast),
    "select": Kernel(_select, widen=False),
    "clip": Kernel(_clip),
    "threshold": Kernel(_threshold),
    "rsqrt": Kernel(_rsqrt),
    "inverse": Kernel(_inverse),
    "log": Kernel(_log),
}
