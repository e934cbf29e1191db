"""The stages of an export: how long each took, and which one failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from moec.compiler.common.errors import out_of_memory
from moec.compiler.common.progress import Progress
from moec.passes import PassRecord


@dataclass
class Stages:
    """Times each stage, tells progress, and notes on an exception in which stage it came up."""

    progress: Progress
    timings: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a stage."""
        start = time.perf_counter()
        self.progress(name, 0, 1)
        try:
            yield
        except Exception as error:
            starved = out_of_memory(error)
            (starved or error).add_note(f"stage: {name}")
            if starved is not None:
                raise starved from error
            raise
        self.timings[name] = time.perf_counter() - start
        self.progress(name, 1, 1)

    def ran(self, record: PassRecord) -> None:
        """Tell about a pass that ran."""
        self.progress(f"pass {record.name}", 1, 1)


def silent(name: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""
