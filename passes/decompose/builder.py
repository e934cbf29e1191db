"""What the rules of decomposition build with: calls that are added in the place of one node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.passes.rewriting import aten, call

Rule = Callable[..., Any]
"""Called with a Builder and the operands by the names of the op's schema. Returns the node that takes the place of the
call, a sequence of them for an op of several results, or None where the call is in its final form already."""

Rules = Mapping[Any, Rule]


def is_tensor(value: Any) -> bool:
    """Whether `value` is a node that stands for a tensor, and not for a size."""
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor)


class Builder:
    """Adds core ops before `node`, in whose place they come.

    Attributes:
        node: The node that is decomposed.
        graph: Its graph.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node, self.graph = node, node.graph

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call."""
        return call(self.graph, op, *args, like=self.node, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the node's result, of the first one where it has several."""
        value = self.node.meta["val"]
        found: torch.dtype = (value[0] if isinstance(value, list | tuple) else value).dtype
        return found

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` in `dtype`; numbers and sizes stay as they are."""
        if not is_tensor(value) or value.meta["val"].dtype == dtype:
            return value
        return self(aten._to_copy.default, value, dtype=dtype)

    def tensor(self, value: Any, dtype: torch.dtype) -> fx.Node:
        """`value` as a tensor of `dtype`: a number becomes a `full` of no axes."""
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
        """The sizes of a tensor: ints, and `sym_size` nodes for those that are dynamic."""
        shape = value.meta["val"].shape
        return [
            size if isinstance(size, int) else self(aten.sym_size.int, value, axis) for axis, size in enumerate(shape)
        ]

    def axis(self, value: fx.Node, axis: int) -> int:
        """`axis` counted from the front."""
        rank: int = value.meta["val"].ndim
        return axis % rank if rank else 0

    def results(self, node: fx.Node) -> list[fx.Node]:
        """The results of a call that has several, each taken by `getitem`."""
        taken = [
            self.graph.create_node("call_function", operator.getitem, (node, i)) for i in range(len(node.meta["val"]))
        ]
        for part, value in zip(taken, node.meta["val"], strict=True):
            part.meta = {"val": value, "module": node.meta.get("module", "")}
        return taken
