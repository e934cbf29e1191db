"""What is read from disk while text is generated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moec.compiler.run import disk_use
from moec.compiler.run.disk_use import DiskUse


def use(read: int | None, faults: int, uses: list[int], hits: list[int]) -> DiskUse:
    return DiskUse(read, faults, np.array(uses, np.int64), np.array(hits, np.int64))


def test_the_figures_are_those_between_two_moments() -> None:
    found = use(5_000_000, 30, [40, 20, 0], [30, 20, 0]).since(use(1_000_000, 10, [20, 10, 0], [20, 10, 0]))
    assert found.record(8) == {
        "bytes_per_token": 500_000,
        "major_faults_per_token": 2.5,
        "hit_rate": pytest.approx(2 / 3),
        "hit_rate_by_layer": [0.5, 1.0, 1.0],
    }
    assert found.line(8) == (
        "disk: 0.50 MB and 2.5 page faults per token; experts found in memory: 66.7% (by layer, in %: 50 100 100)"
    )


def test_what_is_not_known_is_said() -> None:
    found = use(None, 3, [], []).since(use(7, 1, [], []))
    assert found.record(2) == {
        "bytes_per_token": None,
        "major_faults_per_token": 1.0,
        "hit_rate": None,
        "hit_rate_by_layer": [],
    }
    assert found.line(0) == "disk: unknown and 2.0 page faults per token"


def test_bytes_are_those_that_the_kernel_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = SimpleNamespace()
    monkeypatch.setattr(disk_use, "IO", tmp_path / "io")
    assert DiskUse.until_now(runner).bytes is None
    (tmp_path / "io").write_text("rchar: 5\nread_bytes: 4096\nwrite_bytes: 7\n")
    assert DiskUse.until_now(runner).bytes == 4096
