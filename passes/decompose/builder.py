"""The builder with which decomposition rules add the calls that replace a node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.passes.rewriting import aten, call

Rule = Callable[..., Any]
"""Called with a Builder and the operands, by the names in the op's schema. Returns the node that replaces the call (a
sequence of nodes for an op with several results), or None if the call needs no decomposition."""

Rules = Mapping[Any, Rule]


def is_tensor(value: Any) -> bool:
    """Whether `value` is the node of a tensor, rather than of a size."""
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor)


class Builder:
    """Adds core ops before `node`, which they replace.

    Attributes:
        node: The node to decompose.
        graph: Its graph.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node, self.graph = node, node.graph

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call."""
        return call(self.graph, op, *args, like=self.node, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the node's result, or of the first of several."""
        value = self.node.meta["val"]
        found: torch.dtype = (value[0] if isinstance(value, list | tuple) else value).dtype
        return found

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` cast to `dtype`; numbers and sizes are unchanged."""
        if not is_tensor(value) or value.meta["val"].dtype == dtype:
            return value
        return self(aten._to_copy.default, value, dtype=dtype)

    def tensor(self, value: Any, dtype: torch.dtype) -> fx.Node:
        """`value` as a tensor of `dtype`; a number becomes a scalar `full`."""
        if is_tensor(value):
            node: fx.Node = self.cast(value, dtype)
            return node
        return self.full([], value, dtype)

    def full(self, sizes: Sequence[Any], value: Any, dtype: torch.dtype) -> fx.Node:
        """A tensor of the shape `sizes` filled with `value`, a number or a tensor of one element."""
        if is_tensor(value):
            return self(aten.expand.default, self.cast(value, dtype), list(sizes))
        if not isinstance(value, fx.Node):
            value = bool(value) if dtype == torch.bool else value if dtype.is_floating_point else int(value)
        return self(aten.full.default, list(sizes), value, dtype=dtype)

    def sizes(self, value: fx.Node) -> list[Any]:
        """The sizes of a tensor: ints, or `sym_size` nodes if dynamic."""
        shape = value.meta["val"].shape
        return [
            size if isinstance(size, int) else self(aten.sym_size.int, value, axis) for axis, size in enumerate(shape)
        ]

    def axis(self, value: fx.Node, axis: int) -> int:
        """`axis` as a non-negative index."""
        rank: int = value.meta["val"].ndim
        return axis % rank if rank else 0

    def results(self, node: fx.Node) -> list[fx.Node]:
        """The results of a call with several results, as `getitem` nodes."""
        taken = [
            self.graph.create_node("call_function", operator.getitem, (node, i)) for i in range(len(node.meta["val"]))
        ]
        for part, value in zip(taken, node.meta["val"], strict=True):
            part.meta = {"val": value, "module": node.meta.get("module", "")}
        return taken
