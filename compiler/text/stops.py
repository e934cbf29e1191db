"""Strings at which a text ends, found while it grows."""

from __future__ import annotations

from collections.abc import Sequence

from moec.compiler.common.errors import UsageError


class StopStrings:
    """Ends a text before the first stop string, which may be spread over several pieces.

    What may be the beginning of a stop string is held back until the next piece tells. Of two strings, the one that is
    whole first ends the text; of two that the same piece completes, the one that begins first.

    Args:
        stops: The strings; none of them never ends anything.

    Raises:
        UsageError: One of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UsageError("a stop string is empty", hint="leave it out, or give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        """Whether the text has ended."""

    def add(self, piece: str) -> str:
        """What can be shown after `piece`; nothing more once a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        self.found = bool(starts)
        shown = min(starts) if starts else len(text) - self._begun(text)
        self._held = text[shown:]
        return text[:shown]

    def end(self) -> str:
        """What was held back and belongs to the text, since nothing follows."""
        return "" if self.found else self._held

    def _begun(self, text: str) -> int:
        """Characters at the end of `text` with which a stop string may begin."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
