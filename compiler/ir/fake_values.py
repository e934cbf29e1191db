"""Fake values: infer shape and dtype of a call without computing it and without fixing a dynamic axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moec.compiler.common.errors import MoecError


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode that the fake values of `graph` belong to."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def count_fixed_axes(graph: fx.Graph) -> int:
    """The number of axis symbols that were replaced by numbers or other symbols; it grows when an axis is fixed."""
    environment = fake_mode(graph).shape_env
    return len(environment.replacements) if environment is not None else 0


def infer(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode) -> Any:
    """The fake value of calling `target`.

    Args:
        target: An op, or arithmetic on sizes.
        args: Nodes with fake values, and constants.
        kwargs: The same by name.
        mode: Where the fake values live.

    Raises:
        MoecError: The op fixes a dynamic axis to the size of the trace.
    """
    environment = mode.shape_env
    assert environment is not None
    fixed = len(environment.replacements)
    with mode, torch.no_grad():
        value = _SHAPES.get(target, target)(*fx.map_arg(args, fake_value), **fx.map_arg(kwargs, fake_value))
    if len(environment.replacements) != fixed:
        raise MoecError(
            f"{target} fixes a dynamic axis: {dict(environment.replacements)}",
            hint="this is a fault of moec: please report it with the model",
        )
    return value


def fake_value(node: fx.Node) -> Any:
    """The fake value of `node`."""
    return node.meta["val"]


def shape_and_dtype(node: fx.Node) -> tuple[str, torch.dtype]:
    """The shape of a node's fake value, as a text in which symbols can be compared, and its dtype."""
    value = fake_value(node)
    return str(tuple(value.shape)), value.dtype


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    """Shape function of `aten.polar`; torch's own does not support dynamic axes."""
    dtype = torch.complex128 if angle.dtype == torch.float64 else torch.complex64
    return torch.empty_like(radius * angle, dtype=dtype)


_SHAPES: dict[Any, Callable[..., Any]] = {torch.ops.aten.polar.default: _polar}
