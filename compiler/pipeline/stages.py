"""The stages of an export: the time of each, and the name of the stage that failed."""

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
    """Times each stage, reports progress, and adds the name of the stage to an exception."""

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
            no_memory = out_of_memory(error)
            (no_memory or error).add_note(f"stage: {name}")
            if no_memory is not None:
                raise no_memory from error
            raise
        self.timings[name] = time.perf_counter() - start
        self.progress(name, 1, 1)

    def ran(self, record: PassRecord) -> None:
        """Report a pass that ran."""
        self.progress(f"pass {record.name}", 1, 1)


def silent(name: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""
