"""Transformers without bars of its own: moec says itself what it is doing, and `-q` is silent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Leave the progress bars of transformers out, and afterwards as they were."""
    from transformers.utils import logging

    bars: Any = logging  # untyped there
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
