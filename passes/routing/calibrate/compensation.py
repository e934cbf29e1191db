"""Fits what stands in for dropped experts, by least squares on the outputs of the pretrained model's experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program
from moec.passes.routing.calibrate.collect import BATCH, Told, silent
from moec.passes.routing.compensation import Compensation
from moec.passes.routing.policies.base import Policy, select

if TYPE_CHECKING:
    import numpy as np

    from moec.compiler.ir.experts import ExpertCall

RIDGE = 1e-2
"""Penalty of the coefficients, relative to the mean square of their features."""
FLOOR = 1e-6
"""Penalty of features that hardly occur, relative to the mean of all features."""


@dataclass(frozen=True, eq=False)
class RoutedOutputs:
    """What one MoE layer computes for T tokens.

    Attributes:
        hidden: [T, H], the input of the experts.
        indices: [T, k] integers, the expert of each slot.
        weights: [T, k], the routing weights.
        outputs: [T, k, H], the output of each slot's expert before it is multiplied by the weight.
    """

    hidden: Tensor
    indices: Tensor
    weights: Tensor
    outputs: Tensor


def record_outputs(
    program: Program, windows: np.ndarray, consume: Callable[[int, RoutedOutputs], None], told: Told = silent
) -> None:
    """Run text through a Program, and hand over what each MoE layer computes, batch by batch.

    Args:
        program: A Program without a policy.
        windows: Token ids [n, length].
        consume: Called with the number of a layer and its outputs.
        told: Called with the number of finished windows and their total number.
    """
    numbers = {node: number for number, node in enumerate(program.nodes(EXPERTS))}
    calls: list[ExpertCall] = []

    def on_node(node: fx.Node, args: tuple[Any, ...], result: Any) -> None:  # noqa: ARG001
        if node not in numbers:
            return
        hidden, indices, weights = args[:3]
        outputs = torch.zeros(*weights.shape, hidden.shape[-1])
        for call in calls:
            outputs[call.tokens, call.slots] = call.outputs.float()
        calls.clear()
        consume(numbers[node], RoutedOutputs(hidden.float(), indices, weights.float(), outputs))

    def on_expert(node: fx.Node, call: ExpertCall) -> None:  # noqa: ARG001
        calls.append(call)

    runner = ProgramRunner(program, observer=on_node, expert_observer=on_expert)
    for start in range(0, len(windows), BATCH):
        runner.prefill(windows[start : start + BATCH])
        told(min(start + BATCH, len(windows)), len(windows))
    runner.reset()


class Regression:
    """The least squares problem of one layer's compensation; its normal equations grow by batches of tokens.

    Args:
        experts: Number of experts, E.
        hidden: Width of the hidden state, H.
        top_k: Number of slots of a token.
    """

    def __init__(self, experts: int, hidden: int, top_k: int) -> None:
        self._experts, self._top_k = experts, top_k
        self._gram = torch.zeros(experts + hidden, experts + hidden, dtype=torch.float64)
        self._product = torch.zeros(experts + hidden, hidden, dtype=torch.float64)

    def add(self, policy: Policy, layer: int, found: RoutedOutputs) -> None:
        """Add tokens: what a policy makes the layer miss, and the features from which it is predicted."""
        weights = found.weights.clamp(min=0.0)
        selected = select(policy, layer, found.hidden, found.indices, weights)
        dropped = torch.where(selected == 0, weights, 0.0)
        rows = dropped.sum(-1) > 0
        dropped, indices = dropped[rows], found.indices[rows].long().clamp(0, self._experts - 1)
        missing = torch.matmul((weights - selected)[rows].unsqueeze(1), found.outputs[rows]).squeeze(1)
        by_expert = torch.zeros(len(dropped), self._experts).scatter_add(1, indices, dropped)
        features = torch.cat([by_expert, found.hidden[rows] * dropped.sum(-1, keepdim=True)], dim=1)
        self._gram += features.T @ features
        self._product += features.T @ missing

    def solve(self, rank: int) -> Compensation | None:
        """The compensation of a rank, or None if the policy dropped nothing.

        The linear part is the best of its rank for these tokens (reduced-rank regression; Izenman, "Reduced-rank
        regression for the multivariate linear model", 1975); then the table is fitted to what it leaves.
        """
        diagonal = self._gram.diagonal()
        mean = float(diagonal.mean())
        if mean <= 0:
            return None
        experts, gram = self._experts, self._gram + torch.diag(RIDGE * diagonal + FLOOR * mean)
        within, across, rest = gram[:experts, :experts], gram[:experts, experts:], gram[experts:, experts:]
        full = torch.linalg.solve(gram, self._product)[experts:]
        metric = torch.linalg.cholesky(rest - across.T @ torch.linalg.solve(within, across))
        left, values, right = torch.linalg.svd(metric.T @ full, full_matrices=False)
        left, right = _signed(left[:, :rank], right[:rank])
        down = torch.linalg.solve_triangular(metric.T, left * values[:rank], upper=True)
        table = torch.linalg.solve(within, self._product[:experts] - across @ (down @ right))
        return Compensation(table.float(), down.float(), right.float().contiguous(), self._top_k)


def _signed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors with the sign that makes the largest entry of each right one positive, as SVD leaves it open."""
    largest = right.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(right.gather(1, largest) < 0, -1.0, 1.0).to(right.dtype)
    return left * signs.T, right * signs


def fit_compensations(
    program: Program, policy: Policy, windows: np.ndarray, told: Told = silent
) -> tuple[Compensation | None, ...]:
    """Fit the compensation of every layer for which a policy asks; see `Policy.compensates`.

    Args:
        program: The pretrained model, without a policy.
        policy: The policy.
        windows: Token ids [n, length] of calibration text.
        told: Called with the number of finished windows and their total number.

    Returns:
        One compensation per MoE layer, or None where the policy asks for none or drops nothing.
    """
    ranks = [policy.compensates(layer) for layer in range(len(program.layers))]
    problems: dict[int, Regression] = {}

    def consume(number: int, found: RoutedOutputs) -> None:
        if ranks[number]:
            row = program.layers[number]
            own = problems.setdefault(number, Regression(row.num_experts, found.hidden.shape[-1], row.top_k))
            own.add(policy, number, found)

    if any(ranks):
        record_outputs(program, windows, consume, told)
    return tuple(problems[layer].solve(rank) if layer in problems else None for layer, rank in enumerate(ranks))
