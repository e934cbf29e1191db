"""Runs text through the interpreter and records routing, for calibrating and evaluating policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.text.perplexity import kl_divergence, log_softmax
from moec.passes.routing.calibrate.sensitivities import Sensitivities
from moec.passes.routing.calibrate.traces import RoutingTrace
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.layer_k import LayerK
from moec.passes.routing.policies.top_p import TopP

if TYPE_CHECKING:
    from moec.compiler.ir.experts import ExpertCall

Number = TypeVar("Number", int, float)
BATCH = 4
MASSES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
REFERENCE_BYTES = 1 << 29
"""Maximum memory in bytes for the reference's log probabilities while sensitivities are measured."""
Told = Callable[[int, int], None]
Judge = Callable[[np.ndarray, np.ndarray], None]


def silent(done: int, total: int) -> None:
    """A progress function that shows nothing."""


@dataclass
class _Layer:
    """Records of one MoE layer so far, with one list entry per step."""

    weights: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    rms: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    pending: Tensor | None = None
    peaks: Tensor = field(default_factory=lambda: torch.zeros(0))


class Collector:
    """Records the operands of experts nodes while a Program runs.

    Args:
        program: The Program.
        outputs: Whether to record the norm and the largest magnitude of every expert's output.
    """

    def __init__(self, program: Program, *, outputs: bool = False) -> None:
        self._layers = [_Layer(peaks=torch.zeros(row.num_experts)) for row in program.layers]
        self._numbers = {node: number for number, node in enumerate(program.nodes(EXPERTS))}
        self.runner = ProgramRunner(
            program, observer=self._on_node, expert_observer=self._on_expert if outputs else None
        )

    def _on_node(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> None:  # noqa: ARG002
        if node not in self._numbers:
            return
        hidden, indices, weights = args[:3]
        layer = self._layers[self._numbers[node]]
        layer.weights.append(weights.float())
        layer.indices.append(indices.to(torch.int32))
        layer.rms.append(hidden.float().square().mean(-1).sqrt())
        if layer.pending is not None:
            layer.norms.append(layer.pending[: len(weights), : weights.shape[1]])
            layer.pending = None

    def _on_expert(self, node: fx.Node, call: ExpertCall) -> None:
        layer = self._layers[self._numbers[node]]
        if layer.pending is None:
            tokens, slots = node.args[0], self._slots(node)
            assert isinstance(tokens, fx.Node)
            layer.pending = torch.zeros(self._rows, slots)
        layer.pending[call.tokens, call.slots] = call.outputs.float().norm(dim=-1)
        layer.peaks[call.expert] = torch.maximum(layer.peaks[call.expert], call.outputs.float().abs().max())

    @staticmethod
    def _slots(node: fx.Node) -> int:
        weights = node.args[2]
        assert isinstance(weights, fx.Node)
        return int(weights.meta["val"].shape[1])

    def run(self, windows: np.ndarray, told: Told = silent, *, judge: Judge | None = None) -> None:
        """Run windows of token ids [n, length] through the Program.

        Args:
            windows: Token ids.
            told: Called with the number of finished windows and their total number.
            judge: Called with the ids [b, length] and logits [b, length, V] of every step.
        """
        for start in range(0, len(windows), BATCH):
            batch = windows[start : start + BATCH]
            # Some families pass every slot as a separate row, so a layer has at most this many rows.
            self._rows = batch.size * max((self._slots(node) for node in self._numbers), default=1)
            logits = self.runner.prefill(batch)
            if judge is not None:
                judge(batch, logits)
            told(min(start + BATCH, len(windows)), len(windows))
        self.runner.reset()

    def traces(self) -> list[RoutingTrace]:
        """The recorded routing: one trace per MoE layer, in order."""
        return [
            RoutingTrace(
                torch.cat(layer.weights),
                torch.cat(layer.indices),
                torch.cat(layer.rms),
                torch.cat(layer.norms) if layer.norms else None,
            )
            for layer in self._layers
        ]

    def peaks(self) -> list[Tensor]:
        """Largest magnitude in each expert's output, [E] per layer; needs `outputs`."""
        return [layer.peaks for layer in self._layers]


def collect(program: Program, windows: np.ndarray, told: Told = silent) -> list[RoutingTrace]:
    """Run text once and record the routing, from which policies are calibrated.

    Args:
        program: A Program without a policy.
        windows: Token ids [n, length].
        told: Called with the number of finished windows and their total number.

    Returns:
        One trace per MoE layer, in order.
    """
    collector = Collector(program)
    collector.run(windows, told)
    return collector.traces()


def measure_sensitivities(
    program: Program,
    windows: np.ndarray,
    *,
    ks: bool = True,
    masses: tuple[float, ...] = MASSES,
    told: Told = silent,
) -> Sensitivities:
    """Loss increase when a single layer drops slots: mean KL divergence from the pretrained model, in nats.

    Args:
        program: A Program without a policy.
        windows: Token ids [n, length]; fewer are used if their logits do not fit into `REFERENCE_BYTES`.
        ks: Whether to measure every k below the pretrained one in every layer.
        masses: Masses at which to measure top-p, descending from 1; empty: none.
        told: Called with the number of finished measurements and their total number.
    """
    most = max(1, REFERENCE_BYTES // (4 * program.vocab_size * windows.shape[1]))
    windows = windows[:most]
    reference = [log_softmax(ProgramRunner(program).prefill(batch)) for batch in _batches(windows)]
    tops = [row.top_k for row in program.layers]
    total = ks * sum(k - 1 for k in tops) + len(tops) * max(len(masses) - 1, 0)
    done = 0

    def loss(pass_: DynamicRouting) -> float:
        nonlocal done
        value = _divergence(pass_.run(program).program, windows, reference)
        done += 1
        told(done, total)
        return value

    rows = list(enumerate(tops))
    k_loss = [
        (*(loss(DynamicRouting(LayerK(ks=_replaced_at(tops, layer, k)))) for k in range(1, top)), 0.0)
        for layer, top in rows
        if ks
    ]
    # With a slack of 0, a layer keeps its whole mass.
    none = [0.0] * len(tops)
    mass_loss = [
        (0.0, *(loss(DynamicRouting(TopP(mass=mass, slack=_replaced_at(none, layer, 1.0)))) for mass in masses[1:]))
        for layer, _ in rows
        if masses
    ]
    return Sensitivities(tuple(k_loss), masses, tuple(mass_loss))


def _replaced_at(values: list[Number], position: int, value: Number) -> tuple[Number, ...]:
    """`values` with `value` at `position`."""
    changed = list(values)
    changed[position] = value
    return tuple(changed)


def _divergence(program: Program, windows: np.ndarray, reference: list[np.ndarray]) -> float:
    runner = ProgramRunner(program)
    total = 0.0
    for batch, expected in zip(_batches(windows), reference, strict=True):
        total += kl_divergence(expected, log_softmax(runner.prefill(batch)))
    return total / windows.size


def _batches(windows: np.ndarray) -> list[np.ndarray]:
    return [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]
