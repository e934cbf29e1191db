"""What a process reads from disk while it generates, and how often experts were in memory. Imports nothing heavy."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from moec.targets.paging import PagingRunner
from moec.targets.runners import Runner

IO = Path("/proc/self/io")


@dataclass(frozen=True, eq=False)
class DiskUse:
    """Counts of a process and its runner, from their start or between two moments.

    Attributes:
        bytes: Bytes that were read from disk for this process, its mapped files included; None: not known here.
        faults: Page faults that had to wait for a disk.
        uses: For each MoE layer, how many experts steps used; empty if experts are not left on the disk.
        hits: How many of them were in memory.
    """

    bytes: int | None
    faults: int
    uses: np.ndarray
    hits: np.ndarray

    @classmethod
    def until_now(cls, runner: Runner) -> Self:
        """The counts from the start of this process and its runner."""
        paging = runner.paging if isinstance(runner, PagingRunner) else None
        none = np.zeros(0, np.int64)
        return cls(_read(), _faults(), *((none, none) if paging is None else (paging.uses.copy(), paging.hits.copy())))

    def since(self, start: DiskUse) -> DiskUse:
        """The counts between `start` and this moment."""
        read = None if self.bytes is None or start.bytes is None else self.bytes - start.bytes
        return DiskUse(read, self.faults - start.faults, self.uses - start.uses, self.hits - start.hits)

    @property
    def hit_rate(self) -> float | None:
        """Share of the used experts that were in memory; None if it is not known."""
        return float(self.hits.sum() / self.uses.sum()) if self.uses.sum() else None

    @property
    def hit_rates(self) -> list[float]:
        """The same for each MoE layer; 1 where none was used."""
        return [hit / use if use else 1.0 for hit, use in zip(self.hits.tolist(), self.uses.tolist(), strict=True)]

    def record(self, tokens: int) -> dict[str, Any]:
        """For JSON, per token where that has a meaning."""
        tokens = max(1, tokens)
        return {
            "bytes_per_token": None if self.bytes is None else self.bytes / tokens,
            "major_faults_per_token": self.faults / tokens,
            "hit_rate": self.hit_rate,
            "hit_rate_by_layer": self.hit_rates,
        }

    def line(self, tokens: int) -> str:
        """The figures in one line."""
        found = self.record(tokens)
        read = "unknown" if self.bytes is None else f"{found['bytes_per_token'] / 1e6:.2f} MB"
        text = f"disk: {read} and {found['major_faults_per_token']:.1f} page faults per token"
        if self.hit_rate is None:
            return text
        layers = " ".join(f"{100 * rate:.0f}" for rate in self.hit_rates)
        return f"{text}; experts found in memory: {self.hit_rate:.1%} (by layer, in %: {layers})"


def _read() -> int | None:
    with contextlib.suppress(OSError, StopIteration):
        lines = IO.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1])
    return None


def _faults() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
