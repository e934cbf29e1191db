"""The reference: runs a Program in torch, node by node, with weights streamed from the store.

Values are freed after their last use, and weights are read when a node needs them, so memory holds one layer (or one
expert), not the model. A cache keeps recently used weights.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.common.errors import UsageError
from moec.compiler.ir.experts import NOT_ROUNDED, ExpertCall, ExpertInputs, ExpertWeights, Routed, run_experts_together
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import LazyTensor

Observer = Callable[[fx.Node, tuple[Any, ...], Any], None]
"""Called after each node with the node, its evaluated arguments and its result."""

WeightObserver = Callable[[str, int, Tensor], None]
"""Called for every slice of a weight that is read from the store: name, index along axis 0, and values."""

ExpertObserver = Callable[[fx.Node, ExpertCall], None]
"""Called for every expert that a layer runs, with the experts node."""

ActivationRounding = Callable[[LazyTensor, Tensor], Tensor]
"""The weight of a product and the activations [..., K] -> the activations as the kernel rounds them."""

Disturbance = Callable[[Tensor], Tensor]
"""The output [..., N] of a linear, of experts or of an embedding -> the same with errors, which later nodes get."""

LINEAR = torch.ops.aten.linear.default
PRODUCTS = frozenset({LINEAR, EXPERTS, torch.ops.aten.embedding.default})
"""The ops whose outputs a `Disturbance` changes."""


class WeightReader:
    """Reads weights in the dtype of the graph, and keeps the most recently used ones.

    Args:
        cache_bytes: Largest size of the cache in bytes.
        observer: See `WeightObserver`.
    """

    def __init__(self, cache_bytes: int, observer: WeightObserver | None = None) -> None:
        self._limit, self._used, self._observer = cache_bytes, 0, observer
        self._kept: OrderedDict[tuple[str, int | None, torch.dtype], Tensor] = OrderedDict()

    def read(self, name: str, tensor: LazyTensor, dtype: torch.dtype, row: int | None = None) -> Tensor:
        """Values of `tensor`, or of its index `row` along axis 0."""
        key = (name, row, dtype)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = tensor.read() if row is None else tensor.rows(row, row + 1)[0]
        if self._observer is not None and row is not None:
            self._observer(name, row, value)
        value = value.to(dtype)
        size = value.numel() * value.element_size()
        if size <= self._limit:
            self._kept[key] = value
            self._used += size
            while self._used > self._limit:
                _, old = self._kept.popitem(last=False)
                self._used -= old.numel() * old.element_size()
        return value


class Interpreter:
    """Evaluates the graph of a Program.

    Args:
        program: The Program.
        cache_bytes: Memory for weights that are kept between steps; 1 GiB by default.
        observer: See `Observer`.
        expert_observer: See `ExpertObserver`.
        weight_observer: See `WeightObserver`; not called for weights from the cache.
        rounding: How kernels round the activations of a product with a weight; None: they do not.
    """

    def __init__(
        self,
        program: Program,
        *,
        cache_bytes: int = 1 << 30,
        observer: Observer | None = None,
        expert_observer: ExpertObserver | None = None,
        weight_observer: WeightObserver | None = None,
        rounding: ActivationRounding | None = None,
    ) -> None:
        self.program, self.observer, self.expert_observer, self._rounding = program, observer, expert_observer, rounding
        self.disturbance: Disturbance | None = None
        self._reader = WeightReader(cache_bytes, weight_observer)
        self._last_use = _last_uses(program.graph)

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one step.

        Args:
            feeds: A tensor for every input and every state, by the names in `program.inputs` and `program.states`.

        Returns:
            `logits` and the present states by name.

        Raises:
            UsageError: An input is missing.
        """
        program = self.program
        names = [spec.name for spec in program.inputs] + [state.input.name for state in program.states]
        if missing := [name for name in names if name not in feeds]:
            raise UsageError(f"missing inputs: {', '.join(missing)}")
        supply = iter(names)
        values: dict[fx.Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                values[node] = feeds[next(supply)]
            elif node.op == "get_attr":
                values[node] = None  # read where it is used
            else:
                values[node] = self._call(node, values)
            for dead in self._last_use[node]:
                values.pop(dead, None)
        return {name: values[node] for name, node in program.outputs().items()}

    @torch.no_grad()
    def experts(self, node: fx.Node, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Run the experts of one layer alone.

        Args:
            node: A `moec::experts` node whose stacks are weights of the Program.
            hidden: [T, H].
            indices: [T, k].
            weights: [T, k]; 0 drops a slot.

        Returns:
            [T, H]. Each expert that is used is read once.
        """
        return self._experts(node, {}, hidden, indices, weights)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        def value(argument: fx.Node) -> Any:
            return self._weight(argument) if argument.op == "get_attr" else values[argument]

        if node.target is EXPERTS:
            args: Any = fx.map_arg(node.args[:3], value)
            result: Any = self._experts(node, values, *args)
        else:
            args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
            assert callable(node.target)
            operands = args
            if node.target is LINEAR and (rounded := self._rounded(node.args[1])) is not None:
                operands = (rounded(args[0]), *args[1:])
            result = node.target(*operands, **kwargs)
        if self.disturbance is not None and node.target in PRODUCTS:
            result = self.disturbance(result)
        if self.observer is not None:
            self.observer(node, args, result)
        return result

    def _rounded(self, weight: Any) -> Callable[[Tensor], Tensor] | None:
        """How a kernel rounds the activations of a product with `weight`; None if not at all or not known."""
        if self._rounding is None or weight.op != "get_attr":
            return None
        return partial(self._rounding, self.program.weights[self.program.weights.resolve(str(weight.target))])

    def _weight(self, node: fx.Node, row: int | None = None) -> Tensor:
        name = self.program.weights.resolve(str(node.target))
        return self._reader.read(name, self.program.weights[name], node.meta["val"].dtype, row)

    def _experts(
        self, node: fx.Node, values: dict[fx.Node, Any], hidden: Tensor, indices: Tensor, weights: Tensor
    ) -> Tensor:
        return self._experts_together(node, values, [(hidden, indices, weights)])[0]

    def _experts_together(self, node: fx.Node, values: Mapping[fx.Node, Any], calls: Sequence[Routed]) -> list[Tensor]:
        """The outputs of a layer's experts for several calls; each expert that is used is read once.

        Args:
            node: The `moec::experts` node.
            values: Values of the stacks that the graph computes, the same in all calls.
            calls: The operands.
        """
        own = Experts.of(node)

        def row(argument: Any, index: int) -> Tensor | None:
            if argument is None:
                return None
            if argument.op == "get_attr":
                return self._weight(argument, index)
            computed: Tensor = values[argument][index]
            return computed

        def expert(index: int) -> ExpertWeights:
            up, down = row(own.gate_up_proj, index), row(own.down_proj, index)
            assert up is not None
            assert down is not None
            return ExpertWeights(
                up.T if own.transposed else up,
                down.T if own.transposed else down,
                row(own.gate_up_bias, index),
                row(own.down_bias, index),
            )

        watch = None if self.expert_observer is None else partial(self.expert_observer, node)
        up, down = self._rounded(own.gate_up_proj), self._rounded(own.down_proj)
        rounded = NOT_ROUNDED if up is None or down is None else ExpertInputs(up, down)
        return run_experts_together(calls, own.gate, expert, watch, rounded)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose value is not needed after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for argument in node.all_input_nodes:
            last[argument] = node
    dead: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, user in last.items():
        dead[user].append(node)
    return dead


def empty_states(program: Program, batch: int) -> dict[str, Tensor]:
    """States of new sequences: caches without tokens, and zeros.

    Args:
        program: The Program.
        batch: Number of sequences.

    Returns:
        Input name -> tensor.
    """
    return {
        state.input.name: torch.zeros(
            [batch if size == "batch" else 0 if isinstance(size, str) else size for size in state.input.shape],
            dtype=state.input.dtype,
        )
        for state in program.states
    }


def default_positions(attention_mask: Tensor, length: int) -> Tensor:
    """Position ids of the last `length` slots, the number of tokens before each without padding: [B, S] int64."""
    positions = (attention_mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
    return positions[:, -length:] if length else positions[:, :0]


class ProgramRunner(Interpreter):
    """An interpreter that keeps the states between steps, with the interface of `moec.targets.runners.Runner`."""

    _states: Mapping[str, Tensor] = MappingProxyType({})
    _length = 0

    def reset(self) -> None:
        """Forget the sequence."""
        self._states, self._length = {}, 0

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Start new sequences: input_ids [B, S] -> logits [B, S, V] float32."""
        self.reset()
        return self.decode(input_ids, attention_mask)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue: input_ids [B, S], attention_mask [B, past + S] (all ones if None) -> logits [B, S, V]."""
        results = self.run(self.feeds(input_ids, attention_mask))
        self._states = {state.input.name: results[state.output.name] for state in self.program.states}
        self._length += input_ids.shape[1]
        return results["logits"].float().numpy()

    def feeds(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> dict[str, Tensor]:
        """What the next step is fed; arguments as for `decode`."""
        states = self._states or empty_states(self.program, input_ids.shape[0])
        return {**self.inputs(input_ids, attention_mask, self._length), **states}

    def inputs(self, input_ids: np.ndarray, attention_mask: np.ndarray | None, past: int) -> dict[str, Tensor]:
        """What a step after `past` tokens is fed besides states; other arguments as for `decode`."""
        ids = torch.from_numpy(np.ascontiguousarray(input_ids, dtype=np.int64))
        total = past + ids.shape[1]
        mask = (
            torch.ones(ids.shape[0], total, dtype=torch.int64)
            if attention_mask is None
            else torch.from_numpy(np.ascontiguousarray(attention_mask, dtype=np.int64))
        )
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": default_positions(mask, ids.shape[1]),
            "cache_position": torch.arange(past, total),
        }
        return {**feeds, **self._extra(feeds)}

    def _extra(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Defaults of the inputs that passes added, such as a routing budget."""
        defaults = self.program.input_defaults
        return {spec.name: defaults[spec.name] for spec in self.program.inputs if spec.name not in feeds}

    def facts(self) -> dict[str, Any]:
        """Facts about the runtime, for the report."""
        return {"runtime": "moec interpreter", "torch": torch.__version__}
