"""Element-wise ops and activations against torch and coremltools' value inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 5)).astype(np.float32) * 2
Y = RNG.standard_normal((5,)).astype(np.float32) + 0.01
POSITIVE = np.abs(X) + 0.1
UNIT = np.tanh(X) * 0.99
BOOLS = {"x": X > 0, "y": Y > 0}
INTS = {"x": np.array([-7, -2, 0, 5, 9], np.int32), "y": np.array([2, 3, -4, -3, 4], np.int32)}
Case = tuple[Callable[..., Any], dict[str, np.ndarray[Any, Any]], Callable[..., Any]]


def unary(name: str, reference: Callable[..., Any], x: np.ndarray[Any, Any] = X, **more: Any) -> Case:
    return (lambda mb, x: getattr(mb, name)(x=x, **more), {"x": x}, reference)


def binary(name: str, reference: Callable[..., Any], feeds: dict[str, Any] | None = None) -> Case:
    return (lambda mb, x, y: getattr(mb, name)(x=x, y=y), feeds or {"x": X, "y": Y}, reference)


F32 = np.float32
CASES: dict[str, Case] = {
    **{name: unary(name, getattr(torch, name)) for name in ("abs", "atan", "ceil", "cos", "cosh", "erf", "exp")},
    **{name: unary(name, getattr(torch, name)) for name in ("exp2", "floor", "round", "sign", "sin", "sinh")},
    **{name: unary(name, getattr(torch, name)) for name in ("square", "tan", "tanh", "sigmoid", "relu")},
    **{name: unary(name, getattr(torch, name), UNIT) for name in ("acos", "asin", "atanh")},
    "sqrt": unary("sqrt", torch.sqrt, POSITIVE),
    "rsqrt": unary("rsqrt", lambda x: torch.rsqrt(x + 0.5), POSITIVE, epsilon=F32(0.5)),
    "rsqrt_default": unary("rsqrt", torch.rsqrt, POSITIVE),
    "inverse": unary("inverse", lambda x: 1 / (x + 1e-4), POSITIVE),
    "log": unary("log", lambda x: torch.log(x + 0.25), POSITIVE, epsilon=F32(0.25)),
    "log_default": unary("log", torch.log, POSITIVE),
    "clip": unary("clip", lambda x: x.clamp(-0.5, 1.5), alpha=F32(-0.5), beta=F32(1.5)),
    "threshold": unary("threshold", lambda x: x.clamp_min(0.25), alpha=F32(0.25)),
    "silu": unary("silu", functional.silu),
    "softplus": unary("softplus", functional.softplus),
    "relu6": unary("relu6", functional.relu6, X * 4),
    "leaky_relu": unary("leaky_relu", lambda x: functional.leaky_relu(x, 0.2), alpha=F32(0.2)),
    "elu": unary("elu", lambda x: functional.elu(x, 0.7), alpha=F32(0.7)),
    "clamped_relu": unary(
        "clamped_relu",
        lambda x: torch.minimum(functional.leaky_relu(x, 0.2), torch.tensor(1.5)),
        alpha=F32(0.2),
        beta=F32(1.5),
    ),
    "gelu": unary("gelu", functional.gelu),
    "gelu_tanh": unary("gelu", lambda x: functional.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
    "gelu_sigmoid": unary("gelu", lambda x: x * torch.sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
    "softmax": unary("softmax", lambda x: torch.softmax(x, 0), axis=0),
    "softmax_last": unary("softmax", lambda x: torch.softmax(x, -1), X * 40, axis=-1),
    "identity": unary("identity", lambda x: x),
    "cast_int": unary("cast", lambda x: x.to(torch.int32), dtype="int32"),
    "cast_bool": unary("cast", lambda x: x.to(torch.int32), INTS["x"] % 2, dtype="bool"),
    "cast_uint8": unary("cast", lambda x: x.to(torch.uint8), POSITIVE * 20, dtype="uint8"),
    "logical_not": unary("logical_not", torch.logical_not, BOOLS["x"]),
    **{name: binary(name, getattr(torch, name)) for name in ("add", "sub", "mul", "maximum", "minimum")},
    **{name: binary(name, getattr(torch, name)) for name in ("greater", "greater_equal", "less", "less_equal")},
    **{name: binary(name, getattr(torch, name), BOOLS) for name in ("logical_and", "logical_or", "logical_xor")},
    "equal": binary("equal", torch.eq, {"x": X, "y": X[0]}),
    "not_equal": binary("not_equal", torch.ne, {"x": X, "y": X[0]}),
    "real_div": binary("real_div", torch.div),
    "floor_div": binary("floor_div", torch.floor_divide),
    "floor_div_int": binary("floor_div", torch.floor_divide, INTS),
    "mod": binary("mod", torch.remainder),
    "mod_int": binary("mod", torch.remainder, INTS),
    "pow": binary("pow", torch.pow, {"x": POSITIVE, "y": Y}),
    "add_int": binary("add", torch.add, INTS),
    "mul_int": binary("mul", torch.mul, INTS),
    "select": (
        lambda mb, cond, a, b: mb.select(cond=cond, a=a, b=b),
        {"cond": BOOLS["x"], "a": X, "b": np.zeros((1,), F32)},
        torch.where,
    ),
}


WITHOUT_INFERENCE = {"silu", "cast_int", "cast_bool", "cast_uint8"}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name: str, agrees: Callable[..., None]) -> None:
    agrees(name, rtol=2e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_INFERENCE])
def test_agrees_with_value_inference(name: str, agrees: Callable[..., None]) -> None:
    agrees(name, infers=True, rtol=2e-6, atol=2e-6)
