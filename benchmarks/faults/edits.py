"""Ways to change a Program, of which faults are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from faults.fault import Change
from moec.compiler.ir import operands
from moec.compiler.ir.program import (
    ATTENTION,
    CAUSAL_CONV,
    EXPERTS,
    INDEXER,
    LINEAR_ATTENTION,
    RMS_NORM,
    ROTARY,
    SELECT,
    Program,
)
from moec.compiler.ir.weights import Constant
from moec.passes.rewriting import Rewrite, call

aten = torch.ops.aten

VIEWS: dict[Any, Any] = {
    ATTENTION: operands.Attention,
    CAUSAL_CONV: operands.CausalConv,
    EXPERTS: operands.Experts,
    INDEXER: operands.Indexer,
    LINEAR_ATTENTION: operands.LinearAttention,
    RMS_NORM: operands.RmsNorm,
    ROTARY: operands.Rotary,
    SELECT: operands.Select,
}

Choose = Callable[[fx.Graph], fx.Node]
"""Finds the node at which a fault is."""

Make = Callable[[fx.Graph, fx.Node], fx.Node]
"""Adds nodes that compute something else from a value, and returns the last of them."""


def rewritten(change: Callable[[Rewrite], None]) -> Change:
    """The fault that `change` makes in a copy of the graph."""

    def put(program: Program) -> Program:
        state = Rewrite(program)
        change(state)
        return state.result(modified=True).program

    return put


def calls(graph: fx.Graph, op: Any) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=op)


def nth(op: Any, index: int = 0) -> Choose:
    """The call number `index` of `op`."""
    return lambda graph: calls(graph, op)[index]


def where(op: Any, wanted: Callable[[fx.Node], bool]) -> Choose:
    """The first call of `op` that is `wanted`."""
    return lambda graph: next(node for node in calls(graph, op) if wanted(node))


def argument(op: Any, name: str, index: int = 0) -> Choose:
    """An operand of a call of a semantic op."""
    return lambda graph: getattr(VIEWS[op].of(calls(graph, op)[index]), name)


def result(op: Any, output: int, index: int = 0) -> Choose:
    """One of the results of a call."""
    return lambda graph: next(user for user in calls(graph, op)[index].users if user.args[1] == output)


def placeholder(name: str) -> Choose:
    return lambda graph: next(node for node in graph.nodes if node.op == "placeholder" and node.name == name)


def with_operands(op: Any, index: int | None = 0, **changes: Any) -> Change:
    """Other operands for one call of a semantic op (`index` None: for all); a function gets the operands."""

    def change(state: Rewrite) -> None:
        for node in calls(state.graph, op) if index is None else [calls(state.graph, op)[index]]:
            own = VIEWS[op].of(node)
            given = {name: value(own) if callable(value) else value for name, value in changes.items()}
            node.args = dataclasses.replace(own, **given).args

    return rewritten(change)


def through(choose: Choose, make: Make) -> Change:
    """Every use of a value gets what `make` computes from it instead."""

    def change(state: Rewrite) -> None:
        node = choose(state.graph)
        users = list(node.users)
        with state.graph.inserting_before(node.next):
            new = make(state.graph, node)
        for user in users:
            user.replace_input_with(node, new)

    return rewritten(change)


def operand_through(op: Any, name: str, make: Make, index: int = 0) -> Change:
    """One operand of a call of a semantic op goes through `make`; other uses of the value do not."""

    def change(state: Rewrite) -> None:
        node = calls(state.graph, op)[index]
        own = VIEWS[op].of(node)
        with state.graph.inserting_before(node):
            new = make(state.graph, getattr(own, name))
        node.args = dataclasses.replace(own, **{name: new}).args

    return rewritten(change)


def skipped(choose: Choose, argument: int = 0) -> Change:
    """A node is left out: its users get its argument."""

    def change(state: Rewrite) -> None:
        node = choose(state.graph)
        node.replace_all_uses_with(node.args[argument])
        state.graph.erase_node(node)
        _remove_unused(state.graph)

    return rewritten(change)


def with_argument(choose: Choose, place: int, value: Any) -> Change:
    """A node with another argument; `value` may be a function of the old one."""

    def change(state: Rewrite) -> None:
        node = choose(state.graph)
        node.update_arg(place, value(node.args[place]) if callable(value) else value)
        _remove_unused(state.graph)

    return rewritten(change)


def _remove_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def applied(op: Any, *rest: Any, **kwargs: Any) -> Make:
    """`op` of the value, with further arguments."""
    return lambda graph, node: call(graph, op, node, *rest, like=node, **kwargs)


def chained(*steps: Make) -> Make:
    """Several steps, one after the other."""

    def make(graph: fx.Graph, node: fx.Node) -> fx.Node:
        for step in steps:
            node = step(graph, node)
        return node

    return make


def rounded_to(dtype: torch.dtype) -> Make:
    """The value in another dtype, and back."""

    def make(graph: fx.Graph, node: fx.Node) -> fx.Node:
        narrow = call(graph, aten._to_copy.default, node, like=node, dtype=dtype)
        return call(graph, aten._to_copy.default, narrow, like=node, dtype=node.meta["val"].dtype)

    return make


def rolled(axis: int, size: int, by: int) -> Make:
    """The entries of an axis of a fixed size, moved round by `by`."""

    def make(graph: fx.Graph, node: fx.Node) -> fx.Node:
        first = call(graph, aten.slice.Tensor, node, axis, size - by, size, 1, like=node)
        second = call(graph, aten.slice.Tensor, node, axis, 0, size - by, 1, like=node)
        return call(graph, aten.cat.default, [first, second], axis, like=node)

    return make


def weighted(*values: float) -> Make:
    """The columns of a value [T, k], each times a number."""

    def make(graph: fx.Graph, node: fx.Node) -> fx.Node:
        total: fx.Node | None = None
        for place, value in enumerate(values):
            part = call(graph, aten.slice.Tensor, node, 1, place, place + 1, 1, like=node)
            scaled = call(graph, aten.mul.Tensor, part, float(value), like=node)
            total = scaled if total is None else call(graph, aten.cat.default, [total, scaled], 1, like=node)
        assert total is not None
        return total

    return make


def weight_name(program: Program, ending: str) -> str:
    """Name of the first weight with this ending."""
    return next(name for name in program.weight_names() if name.endswith(ending))


def with_weight(ending: str, function: Callable[[Tensor], Tensor]) -> Change:
    """The first weight whose name has this ending, with other values."""

    def put(program: Program) -> Program:
        name = program.weights.resolve(weight_name(program, ending))
        value = function(program.weights.read(name).clone())
        return program.replace(weights=program.weights.with_tensors({name: Constant(value)}))

    return put


def exchanged(first: str, second: str) -> Change:
    """The first weight gets the values of the second; both are given by the ending of their names."""

    def put(program: Program) -> Program:
        name = program.weights.resolve(weight_name(program, first))
        other = program.weights[weight_name(program, second)]
        return program.replace(weights=program.weights.with_tensors({name: other}))

    return put


def in_experts(operand: str, function: Callable[[Tensor], Tensor], layer: int = 0) -> Change:
    """The stacked weight or bias of a layer's experts, with other values."""

    def put(program: Program) -> Program:
        node = operands.Experts.of(program.nodes(EXPERTS)[layer]).stacks[operand]
        name = program.weights.resolve(str(node.target))
        value = function(program.weights.read(name).clone())
        return program.replace(weights=program.weights.with_tensors({name: Constant(value)}))

    return put
