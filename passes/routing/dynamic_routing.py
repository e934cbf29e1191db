"""Dynamic routing: inserts a policy between the router and the experts of every MoE layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moec.compiler.common.errors import UsageError
from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, SELECT, Program, TensorSpec, module_of
from moec.passes.base import Pass, PassResult
from moec.passes.decompose.decompose import decompose
from moec.passes.rewriting import aten, rewritten
from moec.passes.routing.inserter import Inserter
from moec.passes.routing.policies.base import Policy, Slots, selection
from moec.passes.routing.routing_weights import non_negative

BUDGET_INPUT = "routing_budget"
"""Name of the run-time input that replaces the policy's knob."""


@dataclass(frozen=True)
class DynamicRouting(Pass):
    """Insert `moec::select` in front of every experts node, with the policy's rule as aten ops.

    The rule gets slots in descending order of weight. If the router's ops do not guarantee this order, a top-k sorts
    weights and indices first. Layers with a single slot per token, and layers in which the policy keeps every slot, are
    not changed.

    ```
    %y = experts(%x, %indices, %weights, ...)
    ->
    %mass = matmul(%weights, @before)                     # top-p; @before is a constant [k, k]
    %total = sum(%weights, [-1], True)
    %bound = mul(%total, 0.9)
    %keep = lt(%mass, %bound)
    %selected = moec.select(%weights, %keep, True)
    %y = experts(%x, %indices, %selected, ...)
    ```

    Attributes:
        policy: The policy.
        runtime_budget: Whether to make the policy's knob the Program input `routing_budget` (float32 scalar), with
            the policy's value as its default.
    """

    name: ClassVar[str] = "dynamic-routing"

    policy: Policy
    runtime_budget: bool = False

    def run(self, program: Program) -> PassResult:
        """See the class.

        Raises:
            UsageError: The policy has no knob that can be set at run time, or was calibrated for fewer layers.
        """
        graph = program.copy_graph()
        inserter = Inserter(program, graph)
        budget = self._budget(graph, inserter.mode) if self.runtime_budget else None
        rejections: list[Rejection] = []
        for layer, experts in enumerate(graph.find_nodes(op="call_function", target=EXPERTS)):
            reason = self._insert(inserter, layer, experts, budget)
            if reason:
                rejections.append(Rejection(self.name, module_of(experts), reason))
        if not inserter.modified:
            return PassResult(program, modified=False, rejections=tuple(rejections))
        decompose(inserter.added)
        changed = rewritten(program, graph, program.weights.with_tensors(inserter.constants))
        if budget is not None:
            default = torch.tensor(self.policy.knob_value, dtype=torch.float32)
            changed = changed.replace(
                inputs=(*program.inputs, TensorSpec(BUDGET_INPUT, (), torch.float32)),
                input_defaults={**program.input_defaults, BUDGET_INPUT: default},
            )
        return PassResult(changed, True, tuple(rejections))

    def _budget(self, graph: fx.Graph, mode: Any) -> fx.Node:
        if self.policy.knob is None:
            raise UsageError(
                f"policy {self.policy.name} has no parameter that can be set at run time",
                hint="drop --routing-input, or choose a policy with a threshold, such as top-p or capped",
            )
        placeholders = graph.find_nodes(op="placeholder")
        names = [str(node.target) for node in placeholders]
        inputs = sum(not name.startswith("past_") for name in names)
        with graph.inserting_after(placeholders[inputs - 1]):
            node = graph.placeholder(BUDGET_INPUT)
        with mode:
            node.meta = {"val": torch.empty((), dtype=torch.float32), "module": ""}
        return node

    def _insert(self, inserter: Inserter, layer: int, experts: fx.Node, budget: fx.Node | None) -> str:
        """Insert the policy in one layer; returns why the layer was not changed, or an empty text."""
        own = Experts.of(experts)
        hidden, indices, weights = own.hidden_states, own.indices, own.weights
        if int(weights.meta["val"].shape[1]) == 1:
            return "its tokens have one expert each, which is always kept"
        rule = _trace(self.policy, layer, [hidden, indices, weights], budget)
        if rule is None:
            return ""
        inserter.begin(experts, "select")
        ordered_indices, ordered = inserter.in_order(indices, weights)
        seen = ordered if non_negative(weights) else inserter.call(aten.clamp.default, ordered, 0)
        keep = inserter.splice(rule, [hidden, ordered_indices, seen, budget])
        selected = inserter.call(SELECT, ordered, keep, self.policy.renormalizes(layer))
        experts.update_arg(1, ordered_indices)
        experts.update_arg(2, selected)
        return ""


def _trace(policy: Policy, layer: int, operands: list[fx.Node], budget: fx.Node | None) -> fx.Graph | None:
    """The policy's rule as a graph of aten ops over (hidden, indices, weights, budget); None if it keeps all."""
    kept_all = False
    values = [node.meta["val"] for node in operands]

    def rule(hidden: Tensor, indices: Tensor, weights: Tensor, fed: Tensor) -> Tensor:
        nonlocal kept_all
        knob = None if budget is None else fed
        slots = Slots(layer, indices, weights.to(torch.float32), hidden, knob, descending=True)
        mask = selection(policy, slots)
        kept_all = mask is None
        return weights if mask is None else mask

    # The rule mixes real tensors, such as arange, with fake ones; traced constants are evaluated later.
    # A new tensor, since two inputs that are the same object would be traced as one.
    fed = values[2].new_empty(()) if budget is None else budget.meta["val"]
    traced = make_fx(rule, tracing_mode="fake", _allow_non_fake_inputs=True)(*values, fed)
    if kept_all:
        return None
    traced.graph.eliminate_dead_code()
    graph: fx.Graph = traced.graph
    return graph
