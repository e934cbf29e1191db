"""How a long stage reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a description of the work, the number of finished steps and the number of all steps."""
