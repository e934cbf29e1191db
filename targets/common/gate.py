"""The activation of an expert, between its two projections, for every target: see `moec.compiler.ir.experts.Gate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from moec.compiler.ir.experts import Gate

V = TypeVar("V")


class Functions(Protocol[V]):
    """The functions of a runtime from which gates are built. V is the runtime's type of values."""

    def unary(self, name: str, x: V) -> V:
        """`relu`, `sigmoid`, `tanh`, `silu`, `gelu` or `gelu_tanh` of x."""

    def binary(self, name: str, x: V, y: V | float) -> V:
        """`add`, `mul` or `min` of x and y, or `clip`: x between -y and y. `y` may be a number."""


def activated(functions: Functions[V], name: str, x: V) -> V:
    """The activation called `name` in `moec.compiler.ir.experts.ACTIVATIONS`, applied to `x`."""
    match name:
        case "identity":
            return x
        case "relu2":
            positive = functions.unary("relu", x)
            return functions.binary("mul", positive, positive)
        case _:
            return functions.unary(name, x)


def gated(functions: Functions[V], gate: Gate, parts: Sequence[V]) -> V:
    """Apply `gate` to `parts`, each [..., I]: the gate and up projections, or one projection if it is not gated."""
    if not gate.gated:
        (whole,) = parts
        return activated(functions, gate.activation, whole)
    first, up = parts
    if gate.limit:
        first = first if gate.limit_activated else functions.binary("min", first, gate.limit)
        up = functions.binary("clip", up, gate.limit)
    if gate.activation == "silu" and gate.alpha != 1.0:
        share = functions.unary("sigmoid", functions.binary("mul", first, gate.alpha))
        result = functions.binary("mul", first, share)
    else:
        result = activated(functions, gate.activation, first)
    if gate.limit and gate.limit_activated:
        result = functions.binary("min", result, gate.limit)
    return functions.binary("mul", result, functions.binary("add", up, gate.up_offset) if gate.up_offset else up)
