"""A limit on the memory of a run: the user's (`--memory-limit`), or that of the container. Imports no torch.

Dense weights always stay in memory. If all weights fit, an artifact is opened as without a limit; otherwise experts
are left on the disk until tokens are routed to them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from moec.compiler.common.control_groups import memory_limit
from moec.compiler.common.errors import ArtifactError, UsageError, first_line
from moec.compiler.common.memory import resident_bytes
from moec.compiler.measure.estimate.paging import least_memory
from moec.targets.base import Target
from moec.targets.paging import WeightSizes
from moec.targets.runners import Runner

RESERVE = 32 << 20
"""Bytes of a container that are left free: pages that are being read, and what the process allocates in a step."""


@dataclass(frozen=True)
class MemoryLimit:
    """A limit on memory.

    Attributes:
        bytes: The limit: on weights if the user gave it, else on all memory of the process.
        libraries: Bytes of files that the process had in memory before it opened weights.
        of_container: Whether it is the limit of the control group.
    """

    bytes: int
    libraries: int = 0
    of_container: bool = False

    @classmethod
    def of(cls, given: int | None) -> Self | None:
        """The limit that the user gives, or that of the control group; None if there is no limit.

        Raises:
            UsageError: The user gives one, and this system has no mapped files that can be asked for in parts.
        """
        if given is not None:
            if sys.platform != "linux":
                raise UsageError("a limit on memory needs Linux", hint="leave out --memory-limit")
            return cls(given)
        limit = memory_limit() if sys.platform == "linux" else None
        return None if limit is None else cls(limit, resident_bytes()[1], of_container=True)

    def room(self, dense: int) -> int:
        """Bytes that experts may take now, beside `dense` bytes of other weights."""
        if not self.of_container:
            return self.bytes - dense
        return self.bytes - dense - self.libraries - resident_bytes()[0] - RESERVE

    def open(self, directory: Path, manifest: Mapping[str, Any], target: Target, threads: int) -> tuple[Runner, str]:
        """Open packed weights within the limit, and a note on what could not be done.

        Raises:
            UsageError: The user's limit is too small, or the experts cannot be left on the disk.
            ArtifactError: The weights cannot be opened.
        """
        files = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        if files <= self.room(0):
            return target.open(directory, threads=threads), ""
        try:
            sizes = target.weight_sizes(directory)
            if sizes.total <= self.room(0):
                return target.open(directory, threads=threads), ""
            self.check(sizes, manifest)
            opened = target.open_paged(
                directory, lambda: self.room(sizes.dense), threads=threads, drop_cache=self.of_container
            )
        except (UsageError, ArtifactError) as error:
            if not self.of_container:
                raise
            return target.open(directory, threads=threads), f"experts are not left on the disk: {first_line(error)}"
        return opened, opened.note

    def check(self, sizes: WeightSizes, manifest: Mapping[str, Any]) -> None:
        """Check that dense weights and the experts of one token fit.

        Raises:
            UsageError: They do not.
        """
        least = least_memory(sizes, manifest)
        missing = least - sizes.dense - self.room(sizes.dense)
        if missing > 0:
            what = "the container's memory" if self.of_container else "the limit on memory"
            raise UsageError(
                f"{what} of {self.bytes / 1e6:.1f} MB is too small: dense weights take {sizes.dense / 1e6:.1f} MB and "
                f"the experts of one token in one layer {(least - sizes.dense) / 1e6:.1f} MB",
                hint=f"give at least {(self.bytes + missing) / 1e6 + 0.1:.1f} MB, or quantize dense weights further",
            )
