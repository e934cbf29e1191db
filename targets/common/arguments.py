"""Typed access to the arguments of an fx node; an argument of another type fails an assertion."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def is_tensor(argument: Any) -> bool:
    """Whether an argument is a tensor, rather than a number or a symbolic size."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def node_of(argument: Any) -> fx.Node:
    """An argument that must be a node."""
    assert isinstance(argument, fx.Node), argument
    return argument


def shape_of(argument: Any) -> tuple[Any, ...]:
    """Shape of an argument that must be a tensor; sizes may be symbolic."""
    return tuple(node_of(argument).meta["val"].shape)


def rank(argument: Any) -> int:
    """Number of axes of an argument that must be a tensor."""
    return len(shape_of(argument))


def result_dtype(node: fx.Node) -> torch.dtype:
    """Dtype of a node's value."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def expansion(node: fx.Node) -> list[Any]:
    """For `aten.expand`: the size that each axis is broadcast to, or 1 where its size does not change."""
    source, sizes = node_of(node.args[0]), listed(node.args[1])
    old = [1] * (len(sizes) - rank(source)) + list(shape_of(source))
    return [
        1 if size == -1 or str(new) == str(before) else size
        for size, before, new in zip(sizes, old, shape_of(node), strict=True)
    ]


def integer(argument: Any) -> int:
    """An argument that must be an integer."""
    assert isinstance(argument, int), argument
    return argument


def real(argument: Any) -> float:
    """An argument that must be a number."""
    assert isinstance(argument, int | float), argument
    return float(argument)


def listed(argument: Any) -> list[Any]:
    """An argument that must be a list or tuple."""
    assert isinstance(argument, list | tuple), argument
    return list(argument)
