"""The two parts that a rotation combines: halves of the last axis, or its even and odd elements."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from moec.passes.rewriting import aten, call, is_call, last_axis, tensor_shape

HALVES = "halves"
EVEN_ODD = "even and odd"


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` (0 or 1) of the last axis of `source`, taken in `style`.

    If the part was taken from pairs `[..., D / 2, 2]`, `sizes` are the size arguments of the reshape into pairs, and
    `source` is the input of this reshape.
    """

    source: fx.Node
    style: str
    index: int
    sizes: tuple[Any, ...] | None = None

    def is_of(self, node: fx.Node) -> bool:
        """Whether this is a part of `node`."""
        return node is self.source

    def whole(self, graph: fx.Graph, like: fx.Node) -> fx.Node:
        """The tensor [..., D] that this is a part of; if there is none, it is added at the insertion point."""
        if self.sizes is None:
            return self.source
        shape = [*self.sizes[:-2], like.meta["val"].shape[-1]]
        own = tensor_shape(self.source)
        if own is not None and own == tensor_shape(like):
            return self.source
        return call(graph, aten.reshape.default, self.source, shape, like=like)


def part_of(node: Any) -> Part | None:
    """The part of another tensor that `node` takes, or None."""
    if is_call(node, aten.slice.Tensor):
        return _sliced(node)
    if is_call(node, operator.getitem):
        return _split(node)
    if is_call(node, aten.select.int):
        return _selected(node)
    return None


def _sliced(node: fx.Node) -> Part | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    defaults = (0, None, None, 1)
    axis, start, stop, step = node.args[1:] + defaults[len(node.args) - 1 :]
    width = source.meta["val"].shape[-1]
    if not last_axis(source, axis) or not isinstance(width, int) or width % 2:
        return None
    bounds: Any = (start, stop, step)
    if not all(isinstance(bound, int | None) for bound in bounds):
        return None
    taken = range(width)[slice(*bounds)]
    half = width // 2
    known = {
        range(half): (HALVES, 0),
        range(half, width): (HALVES, 1),
        range(0, width, 2): (EVEN_ODD, 0),
        range(1, width, 2): (EVEN_ODD, 1),
    }
    found = known.get(taken)
    return Part(source, *found) if found else None


def _split(node: fx.Node) -> Part | None:
    """One of two equal pieces."""
    split, index = node.args[:2]
    if not is_call(split, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        return None
    assert isinstance(split, fx.Node)
    source, axis = split.args[0], split.args[2] if len(split.args) > 2 else 0
    assert isinstance(source, fx.Node)
    pieces = split.meta["val"]
    if not last_axis(source, axis) or len(pieces) != 2 or pieces[0].shape[-1] != pieces[1].shape[-1]:
        return None
    return Part(source, HALVES, int(index))  # type: ignore[arg-type]


def _selected(node: fx.Node) -> Part | None:
    """One element of each pair of `reshape(x, [..., D / 2, 2])`."""
    pairs, axis, index = node.args[:3]
    if not is_call(pairs, aten.reshape.default):
        return None
    assert isinstance(pairs, fx.Node)
    sizes = pairs.args[1]
    if not last_axis(pairs, axis) or pairs.meta["val"].shape[-1] != 2 or not isinstance(sizes, list | tuple):
        return None
    source = pairs.args[0]
    assert isinstance(source, fx.Node)
    return Part(source, EVEN_ODD, int(index) % 2, tuple(sizes))  # type: ignore[arg-type]
