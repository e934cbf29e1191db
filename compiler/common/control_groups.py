"""The control groups of this process (versions 1 and 2), by which containers limit it. Imports nothing heavy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""Version 1 spells "no limit" as a number of bytes above this one."""


def control_groups(controller: str) -> Iterator[Path]:
    """Directories of the groups that limit this process, from its own up to the root.

    The limits of all of them apply. Inside of a container the root is that of the container.

    Args:
        controller: What is limited: "cpu" or "memory".
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one for each set of controllers.
        roots = (CGROUPS / controllers, CGROUPS / controller) if controllers else (CGROUPS, CGROUPS / "unified")
        for root in roots:
            own = root / name.strip("/")
            yield from (path for path in (own, *own.parents) if path == root or root in path.parents)


def memory_limit() -> int | None:
    """Bytes of memory that control groups grant this process, its pages of files included; None: there is no limit."""
    found = []
    for group in control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # version 2 spells "no limit" as "max"
                found.append(int((group / name).read_text(encoding="utf-8")))
    return min((limit for limit in found if limit < UNLIMITED), default=None)
