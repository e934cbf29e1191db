"""The memory that control groups grant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from moec.compiler.common import control_groups

NONE = str(2**63 - 4096)


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/", {"memory.max": "2000000000"}, 2 * 10**9),
        ("0::/", {"memory.max": "max"}, None),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "5000"}, 5000),
        ("0::/a/b", {"a/b/memory.max": "4000", "a/memory.max": "5000"}, 4000),
        ("4:memory:/m", {"memory/m/memory.limit_in_bytes": "700", "memory/memory.limit_in_bytes": NONE}, 700),
        ("4:memory:/m", {"memory/m/memory.limit_in_bytes": NONE}, None),
        # The name is that on the host, and the container sees its own group as the root.
        ("4:memory:/docker/1f", {"memory/memory.limit_in_bytes": "900"}, 900),
        ("2:cpu:/d", {"cpu/d/memory.limit_in_bytes": "100"}, None),
        ("0::/", {"memory.max": "nonsense"}, None),
        ("0::/", {}, None),
    ],
)
def test_the_memory_limit_of_control_groups(
    own: str, files: Mapping[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "OWN_CGROUPS", tmp_path / "own")
    assert control_groups.memory_limit() is None, "there are no control groups"
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert control_groups.memory_limit() == limit
