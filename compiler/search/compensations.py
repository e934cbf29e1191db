"""What stands in for the experts that a policy drops in one MoE layer, fitted when a variant first needs it."""

from __future__ import annotations

import numpy as np

from moec.compiler.ir.program import Program
from moec.passes.routing.calibrate.compensation import Regression, RoutedOutputs, record_outputs
from moec.passes.routing.compensation import Compensation
from moec.passes.routing.policies.base import Policy

MOST_BYTES = 1 << 30
"""Largest size of the recorded outputs; models whose outputs are larger are searched without compensation."""


class Compensations:
    """Fits compensations as an export does: on the pretrained model's outputs for calibration text.

    Args:
        program: The pretrained model.
        windows: Token ids [n, length].
    """

    def __init__(self, program: Program, windows: np.ndarray) -> None:
        self._program, self._windows = program, windows
        self._outputs: list[list[RoutedOutputs]] = []
        self._fitted: dict[tuple[int, Policy], Compensation | None] = {}

    @property
    def affordable(self) -> bool:
        """Whether there is text, and the outputs of all slots fit into memory."""
        numbers = sum((row.top_k + 1) * row.hidden_size for row in self._program.layers)
        return 0 < 4 * numbers * self._windows.size <= MOST_BYTES

    def of(self, layer: int, policy: Policy) -> Compensation | None:
        """The compensation of an MoE layer; None if its policy asks for none or drops nothing.

        Args:
            layer: Number of the layer.
            policy: The policy of this layer alone.
        """
        if not policy.compensation:
            return None
        if (layer, policy) not in self._fitted:
            self._fitted[layer, policy] = self._fit(layer, policy)
        return self._fitted[layer, policy]

    def _fit(self, layer: int, policy: Policy) -> Compensation | None:
        row = self._program.layers[layer]
        problem = Regression(row.num_experts, row.hidden_size, row.top_k)
        for found in self._recorded[layer]:
            problem.add(policy, 0, found)
        return problem.solve(policy.compensation)

    @property
    def _recorded(self) -> list[list[RoutedOutputs]]:
        if not self._outputs:
            self._outputs = [[] for _ in self._program.layers]
            record_outputs(self._program, self._windows, lambda number, found: self._outputs[number].append(found))
        return self._outputs
