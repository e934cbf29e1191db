"""Inserts nodes into a Program's graph: single ops, and traced functions with their constants as weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moec.compiler.common.digest import sha256_of_bytes
from moec.compiler.ir.fake_values import fake_mode, infer
from moec.compiler.ir.program import Program, module_of
from moec.compiler.ir.weights import Constant, LazyTensor
from moec.passes.rewriting import aten
from moec.passes.routing.routing_weights import descending


class Inserter:
    """Adds nodes before an experts node; all layers share equal constants."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        self.program, self.graph, self.mode = program, graph, fake_mode(graph)
        self.constants: dict[str, LazyTensor] = {}
        self.modified = False
        self.added: list[fx.Node] = []
        self._nodes: dict[str, fx.Node] = {}
        self._before: fx.Node = next(iter(graph.nodes))
        self._module = ""

    def begin(self, experts: fx.Node, what: str) -> None:
        """Set the insertion point to `experts`; the added nodes are in the submodule `what` of its module."""
        self._before, self._module = experts, f"{module_of(experts)}.{what}"
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

    def splice(self, rule: fx.Graph, operands: Sequence[fx.Node | Tensor | None]) -> fx.Node:
        """Copy a traced rule into the graph; tensors, and nodes that depend on tensors alone, become constants."""
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
