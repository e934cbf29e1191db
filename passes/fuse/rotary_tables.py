"""Tables of cosines and sines: whether their halves are equal, and how to compute only one half."""

from __future__ import annotations

from typing import Any

from torch import fx

from moec.passes.rewriting import CASTS, aten, call, is_call, last_axis, number

_ELEMENTWISE = frozenset({aten.cos.default, aten.sin.default, *CASTS})
_SCALED = frozenset({aten.mul.Tensor, aten.div.Tensor})


def has_equal_halves(table: fx.Node) -> bool:
    """Whether the two halves of the last axis of `table` are provably equal."""
    while True:
        if is_call(table, aten.cat.default):
            return _joins_twice(table)
        source = _source(table)
        if source is None:
            return False
        table = source


def half_of(graph: fx.Graph, table: fx.Node, like: fx.Node) -> fx.Node | None:
    """A table of half the width, from one of the two equal elements of each pair; None if they may differ.

    The ops after the doubling are repeated on half the width; common-subexpressions merges equal nodes later.
    """
    if is_call(table, aten.repeat_interleave.self_int):
        source, repeats, axis = (*table.args, None)[:3]
        assert isinstance(source, fx.Node)
        return source if repeats == 2 and last_axis(source, axis) else None
    source = _source(table)
    if source is None:
        return None
    half = half_of(graph, source, like)
    if half is None:
        return None
    assert callable(table.target)
    return call(graph, table.target, half, *table.args[1:], like=table, **table.kwargs)


def full_table(graph: fx.Graph, half: fx.Node, like: fx.Node) -> fx.Node:
    """A table with two equal halves."""
    return call(graph, aten.cat.default, [half, half], -1, like=like)


def _joins_twice(node: fx.Node) -> bool:
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    return isinstance(parts, list | tuple) and len(parts) == 2 and parts[0] is parts[1] and last_axis(node, axis)


def _source(node: fx.Node) -> fx.Node | None:
    """The input of `node` if its op treats all elements of the last axis in the same way, else None."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source: fx.Node = node.args[0]
    keeps = (
        node.target in _ELEMENTWISE
        or (node.target in _SCALED and number(node.args[1]) is not None)
        or (node.target is aten.unsqueeze.default and _adds_no_last_axis(node, node.args[1]))
        or (node.target is aten.slice.Tensor and not last_axis(node, node.args[1] if len(node.args) > 1 else 0))
    )
    return source if keeps else None


def _adds_no_last_axis(node: fx.Node, axis: Any) -> bool:
    return isinstance(axis, int) and not last_axis(node, axis)
