"""Coverage: which experts the parity inputs reached. An expert that no compared token reached is not proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moec.compiler.gates.reference import Trace
from moec.compiler.gates.verdict import Status, Verdict
from moec.compiler.program import MoeLayer

GATE = "coverage"
LISTED = 6


class Coverage:
    """Tokens per expert of every MoE layer.

    Args:
        layers: The live layers with their live experts.
    """

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self.layers = tuple(layers)
        self._hits = {row.index: np.zeros(row.num_experts, dtype=np.int64) for row in self.layers}

    def add(self, trace: Trace, proven: np.ndarray) -> None:
        """Count the experts of the positions that `proven` [B, T] marks."""
        for layer, slots in trace.slots.items():
            self._hits[layer] += self._count(layer, slots, proven)

    def would_reach(self, trace: Trace) -> bool:
        """Whether `trace` reaches an expert that was not reached before."""
        everywhere = np.ones(trace.tied.shape, dtype=bool)
        return any(
            ((self._hits[layer] == 0) & (self._count(layer, slots, everywhere) > 0)).any()
            for layer, slots in trace.slots.items()
        )

    def _count(self, layer: int, slots: np.ndarray, proven: np.ndarray) -> np.ndarray:
        reached = slots[:, : proven.shape[1]][proven]
        return np.bincount(reached[reached >= 0], minlength=self._hits[layer].size)

    def unreached(self) -> dict[str, list[int]]:
        """Module of each layer -> experts that no compared token reached; layers without any are left out."""
        found = {row.module: np.flatnonzero(self._hits[row.index] == 0).tolist() for row in self.layers}
        return {module: experts for module, experts in found.items() if experts}

    def missing(self) -> list[tuple[int, int]]:
        """Layer and expert of all that no compared token reached."""
        return [(row.index, int(i)) for row in self.layers for i in np.flatnonzero(self._hits[row.index] == 0)]

    @property
    def share(self) -> float:
        """Reached experts of all experts."""
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
            "unreached": self.unreached(),
        }


def judge_coverage(coverages: Mapping[str, Coverage], minimum: float, inputs: Mapping[str, int]) -> Verdict:
    """Judge the coverage of every parity step that ran.

    Args:
        coverages: Parity step -> what it reached; the worst one counts.
        minimum: Share of the live experts that must be reached.
        inputs: Parity step -> number of tokens that its inputs took.
    """
    if not coverages:
        return Verdict(GATE, Status.NOT_RUN, "no parity step ran, so no expert was reached", 5)
    step, worst = min(coverages.items(), key=lambda item: item[1].share)
    total = sum(row.num_experts for row in worst.layers)
    missing = worst.unreached()
    reached = total - sum(len(experts) for experts in missing.values())
    summary = f"{reached} of {total} experts in {len(worst.layers)} layers reached by {inputs[step]} tokens"
    if missing:
        summary += f" ({step}); not reached: {_listing(missing)}"
    status = Status.PASS if worst.share >= minimum else Status.FAIL
    if status is Status.FAIL:
        summary += f". At least {minimum:.1%} is asked for: raise --coverage-tokens, or lower --coverage-min"
    figures = {"minimum": minimum, "steps": {name: each.figures() for name, each in coverages.items()}}
    return Verdict(GATE, status, summary, 5, figures)


def _listing(missing: Mapping[str, list[int]]) -> str:
    """The experts by layer, the first few layers of them: all are in the figures."""
    rows = [f"{module} {', '.join(map(str, experts))}" for module, experts in missing.items()]
    return "; ".join(rows[:LISTED]) + (f"; and {len(rows) - LISTED} more layers" if len(rows) > LISTED else "")
