"""A rejection: where and why a pass or a target did not do what it is for. Every one reaches the user's report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rejection:
    """`source` (a pass or target) left `where` (a module or tensor) alone because of `reason`.

    `hint` is what the user can do about it, where nothing can be built.
    """

    source: str
    where: str
    reason: str
    hint: str = ""

    def record(self) -> Mapping[str, str]:
        """What the report says of something that was left alone in what was built."""
        return {"source": self.source, "where": self.where, "reason": self.reason}
