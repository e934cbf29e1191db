"""Dynamic routing: inserts a policy between the router and the experts of every MoE layer."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moec.compiler.common.digest import sha256_of_bytes
from moec.compiler.common.errors import UsageError
from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.fake_values import fake_mode, infer
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, SELECT, Program, TensorSpec, module_of
from moec.compiler.ir.weights import Constant, LazyTensor
from moec.passes.base import Pass, PassResult
from moec.passes.decompose.decompose import decompose
from moec.passes.rewriting import aten, rewritten
from moec.passes.routing.policies.base import Policy, Slots, selection
from moec.passes.routing.routing_weights import descending, non_negative

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
        inserter = _Inserter(program, graph)
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

    def _insert(self, inserter: _Inserter, layer: int, experts: fx.Node, budget: fx.Node | None) -> str:
        """Insert the policy in one layer; returns why the layer was not changed, or an empty text."""
        own = Experts.of(experts)
        hidden, indices, weights = own.hidden_states, own.indices, own.weights
        if int(weights.meta["val"].shape[1]) == 1:
            return "its tokens have one expert each, which is always kept"
        rule = _trace(self.policy, layer, [hidden, indices, weights], budget)
        if rule is None:
            return ""
        inserter.begin(experts)
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


class _Inserter:
    """Adds nodes before an experts node; all layers share equal constants."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        self.program, self.graph, self.mode = program, graph, fake_mode(graph)
        self.constants: dict[str, LazyTensor] = {}
        self.modified = False
        self.added: list[fx.Node] = []
        self._nodes: dict[str, fx.Node] = {}
        self._before: fx.Node = next(iter(graph.nodes))
        self._module = ""

    def begin(self, experts: fx.Node) -> None:
        """Set the insertion point to `experts`."""
        self._before, self._module = experts, f"{module_of(experts)}.select"
        self.modified = True

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call with its exact fake value."""
        with self.graph.inserting_before(self._before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {"val": infer(target, args, kwargs, self.mode), "module": self._module}
        self.added.append(node)
        return node

    def in_order(self, indices: fx.Node, weights: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Indices and weights of each row in descending order of weight."""
        if descending(weights):
            return indices, weights
        ranked = self.call(aten.topk.default, weights, int(weights.meta["val"].shape[1]))
        values, order = (self.call(operator.getitem, ranked, position) for position in (0, 1))
        return self.call(aten.gather.default, indices, 1, order), values

    def splice(self, rule: fx.Graph, operands: list[fx.Node | None]) -> fx.Node:
        """Copy a traced rule into the graph; nodes that depend on no operand become constants."""
        supply = iter(operands)
        mapping: dict[fx.Node, Any] = {}
        for node in rule.nodes:
            if node.op == "placeholder":
                mapping[node] = next(supply)
            elif node.op == "output":
                return self._placed(mapping[node.args[0]])
            else:
                mapping[node] = self._spliced(node, mapping)
        raise AssertionError("a rule without a result")

    def _spliced(self, node: fx.Node, mapping: dict[fx.Node, Any]) -> fx.Node | Tensor:
        assert callable(node.target)
        args, kwargs = (fx.map_arg(given, lambda source: mapping[source]) for given in (node.args, node.kwargs))
        if all(isinstance(mapping[source], Tensor) for source in node.all_input_nodes):
            constant: Tensor = node.target(*_real(node.args, mapping), **_real(node.kwargs, mapping))
            return constant
        placed = torch.utils._pytree.tree_map_only(Tensor, self._placed, (args, kwargs))
        return self.call(node.target, *placed[0], **placed[1])

    def _placed(self, value: fx.Node | Tensor) -> fx.Node:
        """A node for a constant, as a small weight; equal constants share one."""
        if isinstance(value, fx.Node):
            return value
        value = value.contiguous()
        digest = sha256_of_bytes(str((value.dtype, tuple(value.shape))).encode() + value.numpy().tobytes())
        name = f"routing.{digest[:12]}"
        if name not in self._nodes:
            self.constants[name] = Constant(value)
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self._nodes[name] = self.graph.create_node("get_attr", name)
            with self.mode:
                self._nodes[name].meta = {"val": torch.empty(value.shape, dtype=value.dtype), "module": ""}
        return self._nodes[name]


def _real(given: Any, mapping: dict[fx.Node, Any]) -> Any:
    return fx.map_arg(given, lambda source: mapping[source])
