"""The stages of an export: the time of each, and the name of the stage that failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from moec.compiler.common.errors import out_of_memory
from moec.compiler.common.progress import Progress


@dataclass
class Stages:
    """Times each stage, reports progress, and adds the name of the stage to an exception."""

    progress: Progress
    timings: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str, parts: int = 1) -> Iterator[Callable[[object], None]]:
        """Run a stage of `parts` parts; the function that it yields says that one of them is done."""
        start, done = time.perf_counter(), 0

        def one_is_done(_: object) -> None:
            nonlocal done
            done = min(done + 1, parts - 1)
            self.progress(name, done, parts)

        self.progress(name, 0, parts)
        try:
            yield one_is_done
        except Exception as error:
            no_memory = out_of_memory(error)
            (no_memory or error).add_note(f"stage: {name}")
            if no_memory is not None:
                raise no_memory from error
            raise
        self.timings[name] = time.perf_counter() - start
        self.progress(name, parts, parts)


def silent(name: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""
