"""A rejection: where and why a pass or a target left something unchanged. Every rejection reaches the user's report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rejection:
    """`source` (a pass or target) left `where` (a module or tensor) unchanged because of `reason`.

    `hint` tells the user what to do if nothing can be built for this reason.
    """

    source: str
    where: str
    reason: str
    hint: str = ""

    def record(self) -> Mapping[str, str]:
        """The rejection as an entry of the report."""
        return {"source": self.source, "where": self.where, "reason": self.reason}
