"""A rejection: where and why a pass or a target did not do what it is for. Every one reaches the user's report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rejection:
    """`source` (a pass or target) left `where` (a module or tensor) alone because of `reason`."""

    source: str
    where: str
    reason: str
