"""Which experts the text of the parity cases used: a figure that helps to decide on pruning, and not a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.compiler.gates.reference import Trace
from moec.compiler.ir.program import MoeLayer


class Usage:
    """Tokens per expert of every MoE layer.

    Args:
        layers: The MoE layers of the final Program.
    """

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self.layers = tuple(layers)
        self.tokens = 0
        self._hits = {row.index: np.zeros(row.num_experts, dtype=np.int64) for row in self.layers}

    def add(self, trace: Trace, counted: np.ndarray) -> None:
        """Count the experts of the positions that `counted` [B, T] marks."""
        self.tokens += int(counted.sum())
        for layer, slots in trace.slots.items():
            reached = slots[:, : counted.shape[1]][counted]
            self._hits[layer] += np.bincount(reached[reached >= 0], minlength=self._hits[layer].size)

    def never(self) -> dict[str, list[int]]:
        """Module of a layer -> experts that no token used; layers without such experts are left out."""
        found = {row.module: np.flatnonzero(self._hits[row.index] == 0).tolist() for row in self.layers}
        return {module: experts for module, experts in found.items() if experts}

    @property
    def share(self) -> float:
        """Share of all experts that were used."""
        hits = np.concatenate([self._hits[row.index] for row in self.layers]) if self.layers else np.zeros(0)
        return float((hits > 0).mean()) if hits.size else 1.0

    def figures(self) -> dict[str, Any]:
        """Tokens per expert by layer, for the report."""
        return {
            "share": self.share,
            "layers": [
                {"layer": row.index, "module": row.module, "tokens": self._hits[row.index].tolist()}
                for row in self.layers
            ],
            "never": self.never(),
        }
