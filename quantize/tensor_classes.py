"""What each weight of a Program is for, read off the graph and never off a name of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from moec.compiler.common.errors import UsageError
from moec.compiler.ir.program import ATTENTION, EXPERTS, Program, module_of
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.formats import Format
from moec.quantize.plan import QuantizationPlan, TensorClass

LINEAR = torch.ops.aten.linear.default
EMBEDDING = torch.ops.aten.embedding.default
MINIMUM_ROWS = 16
"""A linear with fewer outputs (a gate of one number, say) saves nothing and stays float."""


@dataclass(frozen=True, slots=True)
class Role:
    """Class of a weight and the index of the layer it belongs to (attention layers count; -1 outside of all)."""

    tensor_class: TensorClass
    layer: int


def weight_roles(program: Program) -> Mapping[str, Role]:
    """Role of every matrix that a linear, an embedding or an experts node uses, by its name in the WeightStore.

    A tied weight has the role of the head, which is the more sensitive of its two.
    """
    roles: dict[str, Role] = {}
    layers = _layers(program)
    routers = _routers(program)
    head = _head(program)
    attention = {module_of(node) for node in program.nodes(ATTENTION)}
    resolve = program.weights.resolve

    def assign(argument: object, tensor_class: TensorClass, node: fx.Node) -> None:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            name = resolve(str(argument.target))
            if tensor_class is TensorClass.LM_HEAD or name not in roles:
                roles[name] = Role(tensor_class, layers[node])

    for node in program.graph.nodes:
        if node.target is EXPERTS:
            assign(node.args[3], TensorClass.EXPERTS_GATE_UP, node)
            assign(node.args[5], TensorClass.EXPERTS_DOWN, node)
        elif node.target is EMBEDDING:
            assign(node.args[0], TensorClass.EMBEDDING, node)
        elif node.target is LINEAR:
            assign(node.args[1], _linear_class(node, routers, head, attention), node)
    return roles


def _linear_class(node: fx.Node, routers: set[fx.Node], head: fx.Node | None, attention: set[str]) -> TensorClass:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    if node in routers:
        return TensorClass.ROUTER
    if node is head:
        return TensorClass.LM_HEAD
    if weight.meta["val"].shape[0] < MINIMUM_ROWS:
        return TensorClass.OTHER
    module = module_of(node)
    if any(module == owner or module.startswith(f"{owner}.") for owner in attention):
        return TensorClass.ATTENTION
    return TensorClass.SHARED_EXPERT


def _layers(program: Program) -> dict[fx.Node, int]:
    """Node -> how many attention nodes lie before it, minus one where it is not part of their module."""
    index, seen = {}, -1
    owners = [module_of(node) for node in program.nodes(ATTENTION)]
    for node in program.graph.nodes:
        following = owners[seen + 1] if seen + 1 < len(owners) else None
        if following is not None and module_of(node).startswith(following):
            index[node] = seen + 1
        else:
            index[node] = seen
        if node.target is ATTENTION:
            seen += 1
    return index


def _routers(program: Program) -> set[fx.Node]:
    """Linears between the hidden states of a layer and its routing: they lead to indices or weights alone."""
    routers: set[fx.Node] = set()
    for node in program.nodes(EXPERTS):
        hidden, *routing = (argument for argument in node.args[:3] if isinstance(argument, fx.Node))
        waiting, done = list(routing), _before(hidden)
        while waiting:
            current = waiting.pop()
            if current in done:
                continue
            done.add(current)
            if current.target is LINEAR:
                routers.add(current)
            waiting += current.all_input_nodes
    return routers


def _before(hidden: fx.Node) -> set[fx.Node]:
    """`hidden` and what it is made of, as far as the last attention or experts node."""
    found: set[fx.Node] = set()
    waiting = [hidden]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node.target not in (ATTENTION, EXPERTS):
                waiting += node.all_input_nodes
    return found


def _head(program: Program) -> fx.Node | None:
    """The last linear before the logits."""
    waiting = [program.outputs()["logits"]]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.target is LINEAR:
            return node
        if node.target in (ATTENTION, EXPERTS):
            return None
        waiting += node.all_input_nodes
    return None


def format_of(plan: QuantizationPlan, name: str, role: Role, tensor: LazyTensor) -> Format:
    """The format of a tensor; a stack of experts has one.

    Raises:
        UsageError: The plan gives the experts of one tensor several formats.
    """
    chosen = plan.format_for(role.tensor_class, layer=role.layer)
    if len(tensor.shape) == 3:
        each = {plan.format_for(role.tensor_class, layer=role.layer, expert=i) for i in range(tensor.shape[0])}
        if len(each) > 1:
            names = ", ".join(sorted(str(item) for item in each))
            raise UsageError(
                f"{name}: the plan gives its experts several formats ({names}), but they are stored as one stack",
                hint="override the format of whole layers",
            )
        chosen = each.pop()
    return chosen
