"""Helpers for passes: reading the arguments of a node, and adding nodes with exact fake values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.fake_values import fake_mode, infer
from moec.compiler.ir.program import Program, moe_layers
from moec.compiler.ir.weights import LazyTensor, WeightStore
from moec.passes.base import PassResult

aten = torch.ops.aten

CASTS = (aten._to_copy.default,)


def rewritten(program: Program, graph: fx.Graph, weights: WeightStore | None = None) -> Program:
    """`program` with a changed graph and a MoE layer table that matches it."""
    return program.replace(
        graph=graph, layers=moe_layers(graph), weights=program.weights if weights is None else weights
    )


class Rewrite:
    """Working state of a pass, which changes all of its attributes.

    Attributes:
        graph: A copy of the program's graph.
        added: Tensors that the changed graph uses in addition.
        rejections: Near-matches that were left unchanged, with reasons.
    """

    def __init__(self, program: Program) -> None:
        self._program, self.graph = program, program.copy_graph()
        self.added: dict[str, LazyTensor] = {}
        self.rejections: list[Rejection] = []

    def result(self, *, modified: bool) -> PassResult:
        """The result of the pass; the program itself if nothing was modified."""
        changed = self._program
        if modified:
            changed = rewritten(changed, self.graph, changed.weights.with_tensors(self.added))
        return PassResult(changed, modified, tuple(self.rejections))


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Add a call at the insertion point of `graph`.

    Args:
        graph: The graph.
        target: The op.
        args: Arguments of the op: nodes and constants.
        like: The node that the call replaces; the new node belongs to the same module.
        kwargs: Keyword arguments of the op.
    """
    name = target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else None
    node = graph.create_node("call_function", target, args, kwargs, name)
    node.meta = {"val": infer(target, args, kwargs, fake_mode(graph)), "module": like.meta.get("module", "")}
    return node


def add_weight(graph: fx.Graph, name: str, like: fx.Node) -> fx.Node:
    """Add a `get_attr` of the weight `name` at the insertion point, with the fake value of `like`."""
    node = graph.create_node("get_attr", name)
    node.meta = {"val": like.meta["val"], "module": like.meta.get("module", "")}
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Replace all uses of `old` by `new`, and erase `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def substitute(old: fx.Node, new: fx.Node) -> None:
    """Replace all uses of `old` by `new`, and erase `old` with all nodes that have no users left."""
    old.replace_all_uses_with(new)
    candidates, erased = [old], set[fx.Node]()
    while candidates:
        node = candidates.pop()
        if node.op == "call_function" and not node.users and node not in erased:
            candidates += node.all_input_nodes
            node.graph.erase_node(node)
            erased.add(node)


def is_call(argument: Any, *targets: Any) -> bool:
    """Whether `argument` is a call of one of `targets`."""
    return isinstance(argument, fx.Node) and argument.op == "call_function" and argument.target in targets


def skip_casts(node: fx.Node) -> fx.Node:
    """The node of which `node` is a cast, through any number of casts."""
    while is_call(node, *CASTS):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def number(argument: Any) -> float | None:
    """A Python number, or a scalar `full`, as float; None for anything else."""
    if is_call(argument, aten.full.default) and argument.args[0] in ([], ()):
        argument = argument.args[1]
    if isinstance(argument, int | float) and not isinstance(argument, bool):
        return float(argument)
    return None


def tensor_shape(argument: Any) -> tuple[Any, ...] | None:
    """Shape of a tensor node, with sizes from `size_of`; None for anything else."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    return tuple(size_of(size) for size in value.shape) if isinstance(value, Tensor) else None


def size_of(size: Any) -> Any:
    """A size as an int or a symbolic expression, which can be compared without adding guards to the trace."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return int(size)


def last_axis(node: fx.Node, axis: Any) -> bool:
    """Whether `axis` is the last one of the tensor `node`."""
    rank = node.meta["val"].ndim
    return isinstance(axis, int) and axis in (-1, rank - 1)
