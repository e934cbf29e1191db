"""Stop strings, found while a text grows."""

from __future__ import annotations

from collections.abc import Sequence

from moec.compiler.common.errors import UsageError


class StopStrings:
    """Ends a text before the first stop string, which may extend over several pieces.

    Text that may be the beginning of a stop string is held back until the next piece decides. The stop string that is
    complete first ends the text; if a piece completes two of them, the one that begins first does.

    Args:
        stops: The stop strings; without any, the text never ends.

    Raises:
        UsageError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UsageError("a stop string is empty", hint="omit it, or give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        """Whether a stop string was found, which ends the text."""

    def add(self, piece: str) -> str:
        """Add a piece and return the text that can be shown now; empty after a stop string."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        self.found = bool(starts)
        shown = min(starts) if starts else len(text) - self._begun(text)
        self._held = text[shown:]
        return text[:shown]

    def end(self) -> str:
        """Return the text that was held back, since no piece follows."""
        return "" if self.found else self._held

    def _begun(self, text: str) -> int:
        """Number of characters at the end of `text` that may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
