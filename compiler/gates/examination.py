"""Checks of weights whose codes were read back from the artifact under test.

When an existing artifact is validated, codes that calibration chose are read back from it instead of being calibrated
again. Comparing them with the artifact would prove nothing, so they are compared with the digests in moec.json and with
the weights of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moec.compiler.common.progress import Progress
from moec.compiler.ir.program import Program
from moec.quantize.recorded import Finding, Recorded


@dataclass(frozen=True)
class Examined:
    """Weight name -> result of its check."""

    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One sentence for the verdict; empty if no weight was checked."""
        if not self.findings:
            return ""
        worst = max(finding.error for finding in self.findings.values())
        return (
            f"{len(self.findings)} tensors with calibrated codes: equal to the digests in moec.json, in the plan's "
            f"format, at most {worst:.2f} quantization steps from the checkpoint"
        )

    @property
    def figures(self) -> list[dict[str, Any]]:
        """One entry per weight for the report."""
        return [
            {"name": name, "recorded": item.recorded, "near": item.near, "steps": item.error}
            for name, item in self.findings.items()
        ]

    def not_recorded(self) -> list[str]:
        """Weights whose codes do not have the digest in moec.json."""
        return [name for name, item in self.findings.items() if not item.recorded]

    def too_far(self) -> list[str]:
        """Weights that differ from the checkpoint by more than rounding can cause."""
        return [f"{name} by {item.error:.2g} steps" for name, item in self.findings.items() if not item.near]


def examine(program: Program, what: str, progress: Progress) -> Examined:
    """Check every weight of `program` that was read back, one matrix at a time; `what` is the name for `progress`.

    Raises:
        ArtifactError: A weight of the artifact is not in the format of the plan.
    """
    names = dict.fromkeys(map(program.weights.resolve, program.weight_names()))
    found = {name: tensor for name in names if isinstance(tensor := program.weights[name], Recorded)}
    examined = Examined()
    for done, (name, tensor) in enumerate(found.items()):
        progress(what, done, len(found))
        examined.findings[name] = tensor.examine()
    return examined
