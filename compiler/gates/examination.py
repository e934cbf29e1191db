"""Weights of the final Program whose codes come from the artifact that is judged.

Codes that calibration chose are not chosen again to judge an artifact: they are read back from it. Comparing them with
the artifact would prove nothing, so they are held against the record of the export and against the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moec.compiler.common.progress import Progress
from moec.compiler.ir.program import Program
from moec.quantize.recorded import Finding, Recorded


@dataclass(frozen=True)
class Examined:
    """What was found, by name of the weight."""

    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """What was compared, for the verdict; empty where nothing was."""
        if not self.findings:
            return ""
        worst = max(finding.error for finding in self.findings.values())
        return (
            f"{len(self.findings)} tensors with calibrated codes: as moec.json records them, on the plan's grid, "
            f"at most {worst:.2f} steps of it from the checkpoint"
        )

    @property
    def figures(self) -> list[dict[str, Any]]:
        """For the report."""
        return [
            {"name": name, "recorded": item.recorded, "near": item.near, "steps": item.error}
            for name, item in self.findings.items()
        ]

    def not_recorded(self) -> list[str]:
        """Weights with other codes than the export recorded."""
        return [name for name, item in self.findings.items() if not item.recorded]

    def too_far(self) -> list[str]:
        """Weights that are farther from the checkpoint than rounding leaves them."""
        return [f"{name} by {item.error:.2g} steps" for name, item in self.findings.items() if not item.near]


def examine(program: Program, what: str, progress: Progress) -> Examined:
    """Examine every weight of `program` that was read back, one matrix at a time.

    Raises:
        ArtifactError: The artifact holds one on no grid of the plan.
    """
    names = dict.fromkeys(map(program.weights.resolve, program.weight_names()))
    found = {name: tensor for name in names if isinstance(tensor := program.weights[name], Recorded)}
    examined = Examined()
    for done, (name, tensor) in enumerate(found.items()):
        progress(what, done, len(found))
        examined.findings[name] = tensor.examine()
    return examined
