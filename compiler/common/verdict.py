"""The verdict of a gate. A gate that did not run is never a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Outcome of a gate."""

    PASS = "pass"
    FAIL = "fail"
    NOISY = "too noisy"
    NOT_RUN = "not run"

    @property
    def failed(self) -> bool:
        """Whether it fails the command. Too noisy a measurement proves nothing, so it fails too."""
        return self in (Status.FAIL, Status.NOISY)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one gate.

    Attributes:
        gate: Name of the gate, with a step where it has several: "parity: capture", "parity: artifact", "coverage".
        status: The outcome.
        summary: One line for people: figures with their limits, or why it did not run.
        exit_code: Exit code of the command if this gate fails.
        figures: The measurements for report.json.
    """

    gate: str
    status: Status
    summary: str
    exit_code: int
    figures: Mapping[str, Any] = field(default_factory=dict)
