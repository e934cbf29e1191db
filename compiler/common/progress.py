"""How a long stage reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a description of the work, the number of finished steps and the number of all steps."""


def in_megabytes(progress: Progress, name: str) -> Callable[[int, int], None]:
    """A function that is told the finished bytes and all bytes of a step, and reports them in MB.

    Only the last byte finishes the step, however few there are.
    """

    def told(done: int, total: int) -> None:
        size = max(1, round(total / 1e6))
        progress(f"{name}, MB", size if done >= total else min(round(done / 1e6), size - 1), size)

    return told
