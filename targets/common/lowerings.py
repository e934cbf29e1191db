"""Lowerings that all targets share: they differ only in how the runtime spells an operator.

This module interprets torch's arguments; the context of a target provides the operators (`Operators`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from moec.targets.common.arguments import integer, listed, node_of, rank, result_dtype, shape_of
from moec.targets.common.refusals import refuse

aten = torch.ops.aten


class Operators(Protocol):
    """What the context of a target provides. Values have the runtime's own type; axes are not negative."""

    def get(self, argument: Any) -> Any:
        """What an argument was lowered to."""

    def tensor(self, argument: Any, dtype: torch.dtype | None = None) -> Any:
        """An argument as a value, cast to `dtype` if it has another one."""

    def transpose(self, value: Any, axes: Sequence[int]) -> Any:
        """`value` with its axes in another order."""

    def unsqueeze(self, value: Any, axes: Sequence[int]) -> Any:
        """`value` with new axes of length 1; `axes` are their indices in the result."""

    def squeeze(self, value: Any, axes: Sequence[int]) -> Any:
        """`value` without these axes, each of length 1."""

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        """`parts` concatenated along an axis."""

    def split(self, value: Any, sizes: Sequence[int], axis: int) -> Sequence[Any]:
        """`value` cut along an axis into pieces of `sizes`."""

    def tile(self, value: Any, times: Sequence[Any]) -> Any:
        """`value` repeated along each axis; a count is an integer or the node of a symbolic size."""

    def take(self, source: fx.Node, places: fx.Node, axis: int) -> Any:
        """`source` at the integer indices `places` along an axis; negative indices count from the end."""


Lowering = Callable[[Operators, fx.Node], Any]


def _getitem(ctx: Operators, node: fx.Node) -> Any:
    source, index = node.args
    return ctx.get(source)[index]


def _cast(ctx: Operators, node: fx.Node) -> Any:
    return ctx.tensor(node.args[0], result_dtype(node))


def _permute(ctx: Operators, node: fx.Node) -> Any:
    axes = [integer(axis) % rank(node.args[0]) for axis in listed(node.args[1])]
    return ctx.transpose(ctx.tensor(node.args[0]), axes)


def _unsqueeze(ctx: Operators, node: fx.Node) -> Any:
    return ctx.unsqueeze(ctx.tensor(node.args[0]), [integer(node.args[1]) % rank(node)])


def _squeeze(ctx: Operators, node: fx.Node) -> Any:
    """Torch ignores an axis that is longer than 1."""
    sizes = shape_of(node.args[0])
    axes = sorted({integer(axis) % len(sizes) for axis in listed(node.args[1])})
    found = [axis for axis in axes if isinstance(sizes[axis], int) and sizes[axis] == 1]
    return ctx.squeeze(ctx.tensor(node.args[0]), found) if found else ctx.tensor(node.args[0])


def _concat(ctx: Operators, node: fx.Node) -> Any:
    return ctx.concat([ctx.tensor(item) for item in listed(node.args[0])], integer(node.args[1]) % rank(node))


def _split(ctx: Operators, node: fx.Node) -> Any:
    source, sizes, axis = node.args
    return ctx.split(ctx.tensor(source), listed(sizes), integer(axis) % rank(source))


def _repeat(ctx: Operators, node: fx.Node) -> Any:
    source, times = node.args
    value, extra = ctx.tensor(source), len(listed(times)) - rank(source)
    return ctx.tile(ctx.unsqueeze(value, range(extra)) if extra else value, listed(times))


def _index(ctx: Operators, node: fx.Node) -> Any:
    source, indices = node.args
    used = [(axis, index) for axis, index in enumerate(listed(indices)) if index is not None]
    if len(used) != 1:
        raise refuse(node, "indexing by several tensors is not supported")
    ((axis, places),) = used
    if node_of(places).meta["val"].dtype is torch.bool:
        raise refuse(node, "indexing by a boolean mask is not supported: the size of its result is not known")
    return ctx.take(node_of(source), places, axis)


class Sized(Protocol):
    """What the context of a target with symbolic sizes provides in addition."""

    def axis_length(self, node: fx.Node, axis: int) -> Any:
        """Length of one axis of a tensor, as a scalar value."""

    def size(self, argument: Any) -> Any:
        """A size as a scalar value."""

    def size_arithmetic(self, name: str, *sizes: Any) -> Any:
        """`add`, `sub`, `mul` or `floordiv` of two sizes, or `neg` of one."""

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `make()`, which is called once for each `key`."""


def _axis_size(ctx: Sized, node: fx.Node) -> Callable[[], Any]:
    source, axis = node.args
    return lambda: ctx.axis_length(node_of(source), integer(axis))


def _size_arithmetic(ctx: Sized, node: fx.Node) -> Callable[[], Any]:
    name = node.target.__name__ if callable(node.target) else node.target

    def make() -> Any:
        return ctx.size_arithmetic(name, *map(ctx.size, node.args))

    return lambda: ctx.shared(("size", str(node.meta["val"])), make)


SIZES: Mapping[Any, Callable[[Any, fx.Node], Callable[[], Any]]] = {
    aten.sym_size.int: _axis_size,
    **dict.fromkeys((operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg), _size_arithmetic),
}
"""Sizes and arithmetic on them, for targets with symbolic sizes. Lazy, since most of them are never used."""


TABLE: Mapping[Any, Lowering] = {
    operator.getitem: _getitem,
    aten._to_copy.default: _cast,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dims: _squeeze,
    aten.cat.default: _concat,
    aten.split_with_sizes.default: _split,
    aten.repeat.default: _repeat,
    aten.index.Tensor: _index,
}
