"""Functionalization of a traced graph: writes in place become new values.

`ExportedProgram.run_decompositions` does this by tracing the graph once more, which takes as long as the first trace.
Models write to few tensors, and in few ways: a router divides its weights in place, or a layer fills an empty tensor
slice by slice. This module handles those ways on the graph itself; a graph with any other write is left to torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from moec.compiler.ir.fake_values import fake_mode, infer, shape_and_dtype
from moec.compiler.ir.invariants import SIZE_OPERATORS

aten = torch.ops.aten

_SCATTERS: Mapping[Any, OpOverload] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
"""View op -> the op that writes a view back into its base."""

_UNMARKED = frozenset({aten.dropout.default, aten.type_as.default})
"""Ops that may return their argument although their schema does not say so."""


class _UnclearError(Exception):
    """A node may write to, or alias, a tensor in a way that this module does not handle."""


def functional(graph: fx.Graph) -> fx.Graph | None:
    """Copy `graph` so that no call changes its arguments.

    Casts become `aten._to_copy`. Casts that change nothing, `contiguous` and dropout at inference are dropped.

    Args:
        graph: The graph of a program of `torch.export.export`.

    Returns:
        The copy; None if the graph has a write, or a composite op that may return its argument, which this module does
        not handle.
    """
    try:
        return _Copy(graph).run()
    except _UnclearError:
        return None


class _Copy:
    """Copies a graph node by node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.new, self.mode = graph, fx.Graph(), fake_mode(graph)
        self.now: dict[fx.Node, fx.Node] = {}
        """Tensor -> the node of the copy that holds its current value."""
        self.same: dict[fx.Node, fx.Node] = {}
        """Result of a write, or of a cast that changes nothing -> the tensor that it aliases."""
        self._order = {node: position for position, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {}
        """Tensor -> the one whose memory it may share."""
        self._sharing: dict[fx.Node, list[fx.Node]] = defaultdict(list)

    def run(self) -> fx.Graph:
        """Copy the graph.

        Raises:
            _UnclearError: `functional` returns None for this graph.
        """
        for node in self.graph.nodes:
            if node.op == "output":
                self.new.output(fx.map_arg(node.args[0], self.value))
            else:
                self.now[node] = self._copied(node)
                root = self._root_of(node)
                self._root[node] = root
                self._sharing[root].append(node)
        return self.new

    def value(self, node: fx.Node) -> fx.Node:
        """The node of the copy that holds the current value of `node`."""
        return self.now[self.same.get(node, node)]

    def call(self, node: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of `target` with the metadata of `node`; the arguments are nodes of the copy."""
        added = self.new.create_node("call_function", target, args, kwargs, target._schema.name.rpartition("::")[2])
        added.meta = {**node.meta, "val": infer(target, args, kwargs, self.mode)}
        return added

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            if node.target._schema.is_mutable:
                return self._written(node)
            if rule := _RULES.get(node.target):
                return rule(self, node)
            if _may_be_argument(node.target):
                raise _UnclearError
        elif node.op != "placeholder" and node.target not in SIZE_OPERATORS:
            raise _UnclearError
        return self.new.node_copy(node, self.value)

    def _root_of(self, node: fx.Node) -> fx.Node:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return node
        if isinstance(node.target, OpOverload):
            marked = node.target in _UNMARKED or any(result.alias_info for result in node.target._schema.returns)
            shares = node in self.same if node.target in _CASTS else marked
        else:
            shares = self._root[source] is not source  # an item of several results
        return self._root[source] if shares else node

    def _written(self, node: fx.Node) -> fx.Node:
        """Replace a write by the value that it leaves in its tensor, and in the tensor that this is a slice of."""
        target: Any = node.target
        written = [argument.name for argument in target._schema.arguments if argument.is_write]
        operand: Any = node.args[0] if node.args else None
        operand = self.same.get(operand, operand)
        if written != [target._schema.arguments[0].name] or not isinstance(operand, fx.Node):
            raise _UnclearError
        root = self._root[operand]
        self._check_others(node, operand, root)
        args: Any = fx.map_arg(node.args, self.value)
        kwargs: Any = fx.map_arg(node.kwargs, self.value)
        value = self.call(node, _not_in_place(target), *args, **kwargs)
        if shape_and_dtype(value) != shape_and_dtype(operand):
            raise _UnclearError
        if operand is not root:
            rest = fx.map_arg(operand.args[1:], self.value)
            view: Any = operand.target
            self.now[root] = self.call(node, _SCATTERS[view], self.value(root), value, *rest)
        self.now[operand] = value
        self.same[node] = operand
        return value

    def _check_others(self, node: fx.Node, operand: fx.Node, root: fx.Node) -> None:
        """Check that after the write `node` no alias is read but `operand` and the tensor that it is a slice of.

        Raises:
            _UnclearError: Another alias is read later.
        """
        is_slice = operand.target in _SCATTERS and operand.args[0] is root
        others = (other for other in self._sharing[root] if other is not root and not self._is(other, operand))
        read_later = any(self._order[user] > self._order[node] for other in others for user in other.users)
        if root.op != "call_function" or not (operand is root or is_slice) or read_later:
            raise _UnclearError

    def _is(self, node: fx.Node, other: fx.Node) -> bool:
        return self.same.get(node, node) is other


def _not_in_place(target: OpOverload) -> OpOverload:
    """The out-of-place op of `target`."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    found: OpOverload | None = getattr(packet, target._overloadname, None)
    if found is None or found._schema.is_mutable:
        raise _UnclearError
    return found


def _may_be_argument(target: OpOverload) -> bool:
    """Whether `target` is a composite op that returns its argument in some cases and a copy in others."""
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    marked = torch.Tag.maybe_aliasing_or_mutating in target.tags
    return composite and (marked or any(argument.alias_info for argument in target._schema.arguments))


def _cast(copy: _Copy, node: fx.Node) -> fx.Node:
    source, dtype = _operand(node), node.meta["val"].dtype
    if True in node.args or node.kwargs.get("copy"):
        raise _UnclearError
    if source.meta["val"].dtype != dtype:
        return copy.call(node, aten._to_copy.default, copy.value(source), dtype=dtype)
    copy.same[node] = copy.same.get(source, source)
    return copy.value(source)


def _argument(copy: _Copy, node: fx.Node) -> fx.Node:
    return copy.value(_operand(node))


def _dropout(copy: _Copy, node: fx.Node) -> fx.Node:
    if node.args[2]:
        raise _UnclearError
    return copy.value(_operand(node))


def _flatten(copy: _Copy, node: fx.Node) -> fx.Node:
    source = _operand(node)
    bounds: list[Any] = [*node.args[1:], *(0, -1)[len(node.args) - 1 :]]
    sizes = _sizes(copy, node, source)
    if not sizes:
        raise _UnclearError
    first, last = (axis % len(sizes) for axis in bounds)
    merged = [size for size in sizes[first : last + 1] if isinstance(size, int)]
    joined = math.prod(merged) if len(merged) == last + 1 - first else -1
    return copy.call(node, aten.reshape.default, copy.value(source), [*sizes[:first], joined, *sizes[last + 1 :]])


def _chunk(copy: _Copy, node: fx.Node) -> fx.Node:
    source, axis = _operand(node), node.args[2] if len(node.args) > 2 else 0
    size = source.meta["val"].shape[axis]
    if not isinstance(size, int):
        raise _UnclearError
    return copy.call(node, aten.split.Tensor, copy.value(source), -(-size // node.args[1]), axis)  # type: ignore[operator]


def _view_as(copy: _Copy, node: fx.Node) -> fx.Node:
    other = node.args[1]
    assert isinstance(other, fx.Node)
    return copy.call(node, aten.reshape.default, copy.value(_operand(node)), _sizes(copy, node, other))


def _sizes(copy: _Copy, node: fx.Node, source: fx.Node) -> list[int | fx.Node]:
    """The shape of `source`: numbers, and `sym_size` nodes for dynamic axes, added in the place of `node`."""
    return [
        size if isinstance(size, int) else copy.call(node, aten.sym_size.int, copy.value(source), axis)
        for axis, size in enumerate(source.meta["val"].shape)
    ]


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


_CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout})
_RULES: Mapping[Any, Callable[[_Copy, fx.Node], fx.Node]] = {
    **dict.fromkeys(_CASTS, _cast),
    aten.chunk.default: _chunk,
    aten.contiguous.default: _argument,
    aten.dropout.default: _dropout,
    aten.flatten.using_ints: _flatten,
    aten.reshape.default: lambda copy, node: copy.new.node_copy(node, copy.value),
    aten.view_as.default: _view_as,
}
"""Ops that may return their argument -> their replacement in a Program, which knows no memory layout."""
