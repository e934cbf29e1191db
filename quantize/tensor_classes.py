"""Classifies the weights of a Program by their use in the graph, never by names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from moec.compiler.common.errors import UsageError
from moec.compiler.ir.analysis import TOKEN_MIXERS, ancestors, is_mixer, layer_of, router_nodes
from moec.compiler.ir.operands import Experts, LinearAttention
from moec.compiler.ir.program import ATTENTION, EXPERTS, LINEAR_ATTENTION, Program, module_of
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.formats import Format
from moec.quantize.plan import QuantizationPlan, TensorClass

LINEAR = torch.ops.aten.linear.default
EMBEDDING = torch.ops.aten.embedding.default
MINIMUM_ROWS = 16
"""A linear with fewer outputs, such as a scalar gate, stays float: quantizing it saves nothing."""


@dataclass(frozen=True, slots=True)
class Role:
    """Class and layer of a weight; for the layer, see `layer_of`."""

    tensor_class: TensorClass
    layer: int


def weight_roles(program: Program) -> Mapping[str, Role]:
    """Roles of all matrices that linears, embeddings and experts use, by name in the WeightStore.

    A tied weight has the role of lm_head, the more sensitive one.
    """
    roles: dict[str, Role] = {}
    routers = {node for experts in program.nodes(EXPERTS) for node in router_nodes(experts) if node.target is LINEAR}
    head = _head(program)
    attention = {module_of(node) for node in program.graph.nodes if node.target in TOKEN_MIXERS}
    gates = _gates(program)
    resolve = program.weights.resolve

    def assign(argument: object, tensor_class: TensorClass, node: fx.Node) -> None:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            name = resolve(str(argument.target))
            if tensor_class is TensorClass.LM_HEAD or name not in roles:
                roles[name] = Role(tensor_class, layer_of(node))

    for node in program.graph.nodes:
        if node.target is EXPERTS:
            assign(Experts.of(node).gate_up_proj, TensorClass.EXPERTS_GATE_UP, node)
            assign(Experts.of(node).down_proj, TensorClass.EXPERTS_DOWN, node)
        elif node.target is EMBEDDING:
            assign(node.args[0], TensorClass.EMBEDDING, node)
        elif node.target is LINEAR:
            assign(node.args[1], _linear_class(node, routers, gates, head, attention), node)
    return roles


def _linear_class(
    node: fx.Node, routers: set[fx.Node], gates: set[fx.Node], head: fx.Node | None, attention: set[str]
) -> TensorClass:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    if node in routers:
        return TensorClass.ROUTER
    if node is head:
        return TensorClass.LM_HEAD
    if node in gates or weight.meta["val"].shape[0] < MINIMUM_ROWS:
        return TensorClass.OTHER
    module = module_of(node)
    if any(module == owner or module.startswith(f"{owner}.") for owner in attention):
        return TensorClass.ATTENTION
    return TensorClass.SHARED_EXPERT


def _gates(program: Program) -> set[fx.Node]:
    """Linears that only compute a scan's decay or update rate: they are small, and their errors accumulate."""

    def linears(*operands: fx.Node | None) -> set[fx.Node]:
        through = ancestors(operands, lambda node: node.target is LINEAR or node.target in (ATTENTION, EXPERTS))
        return {node for node in through if node.target is LINEAR}

    scans = [LinearAttention.of(node) for node in program.nodes(LINEAR_ATTENTION)]
    gates = {node for own in scans for node in linears(own.decay, own.beta)}
    return gates - {node for own in scans for node in linears(own.query, own.key, own.value)}


def _head(program: Program) -> fx.Node | None:
    """The last linear before the logits."""
    made_of = ancestors([program.outputs()["logits"]], lambda node: is_mixer(node) or node.target is LINEAR)
    found = next((node for node in made_of if node.target is LINEAR or is_mixer(node)), None)
    return found if found is not None and found.target is LINEAR else None


def format_of(plan: QuantizationPlan, name: str, role: Role, tensor: LazyTensor) -> Format:
    """The format of a tensor; all experts of a stack must have the same one.

    Raises:
        UsageError: The plan gives the experts of one tensor different formats.
    """
    chosen = plan.format_for(role.tensor_class, layer=role.layer)
    if len(tensor.shape) == 3:
        each = {plan.format_for(role.tensor_class, layer=role.layer, expert=i) for i in range(tensor.shape[0])}
        if len(each) > 1:
            names = ", ".join(sorted(str(item) for item in each))
            raise UsageError(
                f"{name}: the plan gives its experts different formats ({names}), but they are stored as one stack",
                hint="override the format of whole layers",
            )
        chosen = each.pop()
    return chosen
