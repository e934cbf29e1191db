"""Switches off the progress bars of transformers: moec reports progress itself, and `-q` is silent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers inside the block, and restore the setting afterwards."""
    from transformers.utils import logging

    bars: Any = logging  # untyped there
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
