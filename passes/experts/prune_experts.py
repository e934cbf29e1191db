"""Expert pruning: removes the least important experts from the stacks, and their rows from the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from moec.compiler.common.errors import UsageError
from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.analysis import router_nodes
from moec.compiler.ir.fake_values import fake_mode, infer
from moec.compiler.ir.operands import Experts, operands
from moec.compiler.ir.program import EXPERTS, Program, module_of
from moec.compiler.ir.weights import LazyTensor, Leaf
from moec.passes.base import Pass, PassResult
from moec.passes.experts.saliency import reap_saliency, super_experts
from moec.passes.rewriting import aten, last_axis, rewritten
from moec.passes.routing.calibrate.traces import RoutingTrace

_LINEAR = (aten.linear.default,)
_PER_ELEMENT = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.sigmoid.default,
    aten.relu.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.exp.default,
    aten.tanh.default,
    aten.clamp.default,
    aten.neg.default,
    aten.log.default,
    aten._to_copy.default,
)
_ALONG_EXPERTS = (aten._softmax.default,)


@dataclass(frozen=True)
class SelectedRows(LazyTensor):
    """Selected rows of `source` along axis 0, which are read one by one."""

    source: LazyTensor
    indices: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of `source`, with the number of selected rows."""
        return (len(self.indices), *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of `source`."""
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """The selected rows [start, stop)."""
        wanted = self.indices[start:stop]
        if not wanted:
            return self.source.rows(0, 0)
        return torch.cat([self.source.rows(row, row + 1) for row in wanted])

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`."""
        source = self.source.map_sources(leaf)
        return None if source is None else SelectedRows(source, self.indices)


@dataclass(frozen=True)
class PruneExperts(Pass):
    """Remove experts from the stacks and from the router, which then chooses among the remaining ones.

    The router is found by walking from the experts node's indices and weights back to hidden_states. Each of its ops
    must treat experts independently: a linear with one row per expert, elementwise ops, biases [E], softmax and top-k
    over the experts. Other routers, such as those that choose groups of experts first, are left unchanged, with a
    rejection. Routers that normalise their weights do so over the remaining experts.

    ```
    %logits = linear(%x, @gate [16, H]); %w, %i = topk(softmax(%logits), 4); experts(%x, %i, %w, @up [16, ..], ..)
    ->
    %logits = linear(%x, @gate [12, H]); %w, %i = topk(softmax(%logits), 4); experts(%x, %i, %w, @up [12, ..], ..)
    ```

    Attributes:
        removed: The experts to remove, one tuple per MoE layer; see `choose_removed`.
    """

    name: ClassVar[str] = "prune-experts"

    removed: tuple[tuple[int, ...], ...]

    def run(self, program: Program) -> PassResult:
        """See the class.

        Raises:
            UsageError: The list does not fit the model, or would leave a layer with fewer experts than its top_k.
        """
        if len(self.removed) != len(program.layers):
            raise UsageError(
                f"experts to prune are listed for {len(self.removed)} MoE layers, "
                f"but the model has {len(program.layers)}"
            )
        graph = program.copy_graph()
        selected: dict[str, LazyTensor] = {}
        rejections: list[Rejection] = []
        for row, experts, removed in zip(
            program.layers, graph.find_nodes(op="call_function", target=EXPERTS), self.removed, strict=True
        ):
            kept = _kept(row.module, row.num_experts, row.top_k, removed)
            if len(kept) == row.num_experts:
                continue
            router = _Router(experts, row.num_experts)
            if reason := router.refusal():
                rejections.append(Rejection(self.name, module_of(experts), reason))
                continue
            for node in router.per_expert:
                name = program.weights.resolve(str(node.target))
                selected[name] = SelectedRows(program.weights[name], kept)
            _infer_shapes(router, len(kept))
        if not selected:
            return PassResult(program, modified=False, rejections=tuple(rejections))
        changed = rewritten(program, graph, program.weights.with_tensors(selected))
        return PassResult(changed, True, tuple(rejections))


def _kept(module: str, count: int, top_k: int, removed: Sequence[int]) -> tuple[int, ...]:
    if any(not 0 <= expert < count for expert in removed):
        raise UsageError(f"{module} has experts 0 to {count - 1}, but {sorted(removed)} are to be pruned")
    kept = tuple(expert for expert in range(count) if expert not in removed)
    if len(kept) < top_k:
        raise UsageError(
            f"{module}: pruning leaves {len(kept)} experts, but every token takes {top_k}", hint="prune fewer experts"
        )
    return kept


class _Router:
    """The ops between hidden_states and the indices and weights of an experts node."""

    def __init__(self, experts: fx.Node, count: int) -> None:
        self.experts, self.count = experts, count
        self.nodes = router_nodes(experts)
        self._wide: set[fx.Node] = set()
        self._ranked = False
        self.per_expert = list(Experts.of(experts).stacks.values())

    def refusal(self) -> str:
        """Why the router cannot be pruned; empty if it can. Fills `per_expert`."""
        for stack in self.per_expert:
            if stack.op != "get_attr":
                return "its expert weights are computed in the graph"
        for node in self.nodes:
            if node.op != "call_function":
                if node.op == "placeholder":
                    return f"its router reads the input {node.target}"
                continue
            if reason := self._step(node):
                return f"its router does not treat experts independently: {reason}"
        if not self._ranked:
            return f"its router does not choose among the {self.count} experts alone"
        ours = {self.experts, *self.nodes}
        for node in self.per_expert:
            if not set(node.users) <= ours:
                return f"the weight {node.target} is also used elsewhere"
        return ""

    def _step(self, node: fx.Node) -> str:
        """Follow the axis of experts through one op; returns why that is not possible, or an empty text."""
        wide = [source for source in node.all_input_nodes if source in self._wide]
        weights = [source for source in node.all_input_nodes if source.op == "get_attr"]
        if node.target in _LINEAR and not wide:
            return self._linear(node, weights)
        if not wide:
            return self._lookup(node, weights)
        if node.target in _PER_ELEMENT:
            self._wide.add(node)
            return self._vectors(weights)
        axis = operands(node).get("dim") if isinstance(node.target, torch._ops.OpOverload) else None
        if node.target in _ALONG_EXPERTS and last_axis(wide[0], axis):
            self._wide.add(node)
            return ""
        if node.target is aten.topk.default and last_axis(wide[0], axis):
            self._ranked = True
            return ""
        if node.target is aten.gather.default and node.args[0] in self._wide and node.args[2] not in self._wide:
            return ""
        return f"{node.target} combines values of several experts"

    def _linear(self, node: fx.Node, weights: list[fx.Node]) -> str:
        if int(node.meta["val"].shape[-1]) != self.count:
            return ""
        for source in weights:
            if int(source.meta["val"].shape[0]) != self.count:
                return f"{source.target} has no row per expert"
        self.per_expert += weights
        self._wide.add(node)
        return ""

    def _lookup(self, node: fx.Node, weights: list[fx.Node]) -> str:
        """Check an op after the top-k: it may only look up vectors with one entry per expert by the indices."""
        if node.target is aten.index.Tensor and weights and weights[0] is node.args[0]:
            self.per_expert += weights
            return "" if tuple(weights[0].meta["val"].shape) == (self.count,) else f"it indexes {weights[0].target}"
        if any(self.count in tuple(source.meta["val"].shape) for source in weights):
            return f"{node.target} uses {weights[0].target}"
        return ""

    def _vectors(self, weights: list[fx.Node]) -> str:
        for source in weights:
            shape = tuple(source.meta["val"].shape)
            if shape and shape[-1] == self.count:
                if len(shape) > 1:
                    return f"{source.target} is not a vector with one entry per expert"
                self.per_expert.append(source)
        return ""


def _infer_shapes(router: _Router, count: int) -> None:
    """Infer the shapes of the pruned weights and of all values computed from them."""
    mode = fake_mode(router.experts.graph)
    for node in dict.fromkeys(router.per_expert):
        old = node.meta["val"]
        with mode:
            node.meta = {**node.meta, "val": torch.empty((count, *old.shape[1:]), dtype=old.dtype)}
    for node in router.nodes:
        if node.op == "call_function":
            assert callable(node.target)
            node.meta = {**node.meta, "val": infer(node.target, node.args, dict(node.kwargs), mode)}


def choose_removed(
    program: Program, traces: Sequence[RoutingTrace], peaks: Sequence[Tensor], share: float
) -> tuple[tuple[int, ...], ...]:
    """The experts of each layer with the least REAP saliency (arXiv:2510.13999), without super experts.

    Args:
        program: The model.
        traces: Routing over calibration text with output norms, one per layer.
        peaks: Largest magnitude of each expert's output, [E] per layer.
        share: Share of the experts of every layer to remove, in (0, 1).

    Raises:
            UsageError: The share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share of experts to prune must be between 0 and 1, not {share:g}")
    ranked = rank_removable(program, traces, peaks)
    counts = [int(share * row.num_experts + 1e-9) for row in program.layers]
    return tuple(tuple(sorted(order[:count])) for order, count in zip(ranked, counts, strict=True))


def rank_removable(
    program: Program, traces: Sequence[RoutingTrace], peaks: Sequence[Tensor]
) -> tuple[tuple[int, ...], ...]:
    """The experts of each layer that may be removed, those that matter least first; arguments as for `choose_removed`.

    Super experts are not among them, and every token finds its top-k among those that are left if all of them go.
    """
    protected = set(super_experts(peaks))
    ranked = []
    for row, trace in zip(program.layers, traces, strict=True):
        assert trace.output_norms is not None
        scores = reap_saliency(trace.indices, trace.weights, trace.output_norms, row.num_experts).tolist()
        free = [expert for expert in range(row.num_experts) if (row.index, expert) not in protected]
        free.sort(key=lambda expert: (scores[expert], expert))
        ranked.append(tuple(free[: row.num_experts - row.top_k]))
    return tuple(ranked)
