"""What a gate says. A gate that did not run is never a pass."""

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
        """Whether it fails the command: what the machine was too noisy to prove is not proven."""
        return self in (Status.FAIL, Status.NOISY)


@dataclass(frozen=True)
class Verdict:
    """One gate's outcome.

    Attributes:
        gate: "parity", "coverage", "integrity", "quality" or "latency", with a step where it has several.
        status: The outcome.
        summary: One line for people: figures with their limits, or why it did not run.
        exit_code: Exit code of the command if this gate fails.
        figures: What was measured, JSON-able, for report.json.
    """

    gate: str
    status: Status
    summary: str
    exit_code: int
    figures: Mapping[str, Any] = field(default_factory=dict)
