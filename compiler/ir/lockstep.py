"""Runs several sequences through a Program together, so that each weight is read once for all of them.

The interpreter runs one step after another and reads every weight for each. Here all sequences, and all steps of each,
go through the graph node by node: a step needs of the step before only the states, and the nodes that make a state
are close to those that use it. The experts of a layer are run expert by expert, each for all sequences. Every operation
has the operands that it would have alone, so the results are the same bit by bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.ir.experts import Routed
from moec.compiler.ir.interpreter import (
    ActivationRounding,
    Disturbance,
    Observer,
    ProgramRunner,
    WeightObserver,
    empty_states,
)
from moec.compiler.ir.program import EXPERTS, Program

CACHED = 1 << 30
"""Bytes of float32 weights up to which a model is kept in memory for the next call."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a batch of sequences.

    Attributes:
        input_ids: The new tokens, [B, S].
        attention_mask: [B, past + S], 0 in left padding; None: all ones.
        observer: See `moec.compiler.ir.interpreter.Observer`.
        disturbance: See `moec.compiler.ir.interpreter.Disturbance`.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray | None = None
    observer: Observer | None = None
    disturbance: Disturbance | None = None


def steps_of(input_ids: np.ndarray, attention_mask: np.ndarray | None, lengths: Sequence[int]) -> list[Step]:
    """Split sequences [B, T] with their mask [B, T] into steps of these `lengths`."""
    stops = np.cumsum(lengths)
    return [
        Step(input_ids[:, stop - length : stop], None if attention_mask is None else attention_mask[:, :stop])
        for stop, length in zip(stops.tolist(), lengths, strict=True)
    ]


@dataclass(eq=False)
class _Lane:
    """A step with the values of its nodes, and the step before it, which has the values of its states."""

    values: dict[fx.Node, Any]
    step: Step
    before: _Lane | None


class Guests(Protocol):
    """Calls of experts that run beside those of the sequences, so that the experts are read once for both."""

    def calls(self, node: fx.Node, hosts: Sequence[Routed]) -> Sequence[Routed]:
        """The calls to add to those of the sequences at an experts node."""

    def take(self, node: fx.Node, results: Sequence[Tensor]) -> None:
        """Called with the results of these calls."""


class Lockstep(ProgramRunner):
    """An interpreter that runs several sequences together.

    Args:
        program: The Program.
        rounding: How kernels round the activations of a product with a weight; None: they do not.
        guests: Further calls of experts.
        weight_observer: See `WeightObserver`; not called again for weights that are kept.
    """

    def __init__(
        self,
        program: Program,
        *,
        rounding: ActivationRounding | None = None,
        guests: Guests | None = None,
        weight_observer: WeightObserver | None = None,
    ) -> None:
        size = sum(torch.Size(program.weights[name].shape).numel() * 4 for name in program.weight_names())
        cached = CACHED if size <= CACHED else 0
        super().__init__(program, cache_bytes=cached, weight_observer=weight_observer, rounding=rounding)
        self._guests = guests
        outputs = program.outputs()
        self._logits = outputs["logits"]
        specs = [*program.inputs, *(state.input for state in program.states)]
        placeholders = program.graph.find_nodes(op="placeholder")
        self._placeholders = {spec.name: node for spec, node in zip(specs, placeholders, strict=True)}
        self._present = {self._placeholders[own.input.name]: outputs[own.output.name] for own in program.states}
        self._segments = _segments(program.graph, self._present)
        self._dead = _last_uses(program.graph, self._logits)
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def run_together(
        self, sequences: Sequence[Sequence[Step]], told: Callable[[int, int], None] = lambda *_: None
    ) -> list[np.ndarray]:
        """Run batches of sequences, each from its first token.

        Args:
            sequences: The steps of each batch.
            told: Called with the number of finished parts of the graph, and of all parts.

        Returns:
            The logits of each batch, [B, T, V] float32.
        """
        batches = [self._lanes(steps) for steps in sequences]
        lanes = [lane for batch in batches for lane in batch]
        for done, segment in enumerate(self._segments):
            self._run_segment(segment, lanes)
            self._held.clear()
            told(done + 1, len(self._segments))
        return [
            np.concatenate([lane.values.pop(self._logits).float().numpy() for lane in batch], axis=1)
            for batch in batches
        ]

    def _lanes(self, steps: Sequence[Step]) -> list[_Lane]:
        lanes: list[_Lane] = []
        past = 0
        for step in steps:
            feeds = self.inputs(step.input_ids, step.attention_mask, past)
            if not lanes:
                feeds |= empty_states(self.program, len(step.input_ids))
            values = {self._placeholders[name]: value for name, value in feeds.items()}
            lanes.append(_Lane(values, step, lanes[-1] if lanes else None))
            past += step.input_ids.shape[1]
        return lanes

    def _run_segment(self, segment: Sequence[fx.Node], lanes: Sequence[_Lane]) -> None:
        if len(segment) == 1 and segment[0].target is EXPERTS:
            self._run_experts(segment[0], lanes)
        else:
            for lane in lanes:
                for node in segment:
                    self._evaluate(node, lane)
        for lane in lanes:
            for node in segment:
                for dead in self._dead.get(node, ()):
                    lane.values.pop(dead, None)

    def _evaluate(self, node: fx.Node, lane: _Lane) -> None:
        if lane.before is not None:
            for state in node.all_input_nodes:
                if state in self._present and state not in lane.values:
                    lane.values[state] = lane.before.values[self._present[state]]
        self.observer, self.disturbance = lane.step.observer, lane.step.disturbance
        lane.values[node] = self._call(node, lane.values)

    def _run_experts(self, node: fx.Node, lanes: Sequence[_Lane]) -> None:
        """Run a layer's experts for all `lanes`."""
        calls: list[Any] = [fx.map_arg(node.args[:3], lane.values.__getitem__) for lane in lanes]
        others = [] if self._guests is None else self._guests.calls(node, calls)
        results = self._experts_together(node, lanes[0].values, [*calls, *others])
        if self._guests is not None:
            self._guests.take(node, results[len(calls) :])
        for lane, call, result in zip(lanes, calls, results[: len(calls)], strict=True):
            step = lane.step
            lane.values[node] = result if step.disturbance is None else step.disturbance(result)
            if step.observer is not None:
                step.observer(node, call, lane.values[node])

    def _weight(self, node: fx.Node, row: int | None = None) -> Tensor:
        """A weight, which is read once for all steps if it is no expert; experts are read once anyway."""
        if row is not None:
            return super()._weight(node, row)
        name = f"{node.target} {node.meta['val'].dtype}"
        if name not in self._held:
            self._held[name] = super()._weight(node)
        return self._held[name]


def _segments(graph: fx.Graph, present: Mapping[fx.Node, fx.Node]) -> list[list[fx.Node]]:
    """Cut the calls of `graph` into parts that all steps can run one after another.

    A step takes a state from the step before, so the nodes from the first use of a state to its new value are one part.
    All other nodes are parts of their own.

    Args:
        graph: The graph.
        present: Placeholder of a state -> node of its new value.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    place = {node: index for index, node in enumerate(nodes)}
    joined = [False] * len(nodes)
    """Whether a node belongs to the part of the node before it."""
    for state, new in present.items():
        places = [place[node] for node in (*state.users, new) if node in place]
        for index in range(min(places, default=0) + 1, max(places, default=0) + 1):
            joined[index] = True
    segments: list[list[fx.Node]] = []
    for node, own in zip(nodes, joined, strict=True):
        if own:
            segments[-1].append(node)
        else:
            segments.append([node])
    return segments


def _last_uses(graph: fx.Graph, logits: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose value no later node needs; that of `logits` is needed after the last one."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            last |= dict.fromkeys((node, *node.all_input_nodes), node)
    last.pop(logits, None)
    dead: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, user in last.items():
        dead[user].append(node)
    return dead
