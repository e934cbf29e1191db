"""How many threads compute, and how they wait for work. Imports nothing heavy.

The number is that of the cores which this process may use: those of its affinity mask, and no more than the CPU quota
of its control group. Runtimes count the cores of the host. In a container that may use 2 of 64 cores, their 64 threads
use up the quota of a period within its first milliseconds, and then all of them stand still.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path

from moec.compiler.common.control_groups import control_groups


def environment() -> Mapping[str, str]:
    """Environment variables for the OpenMP library of torch, which reads them once, when it is loaded.

    Its threads sleep while they wait. A spinning thread occupies the core that the thread it waits for needs: beside
    four busy processes on two cores, the export of the golden model took 110 s of CPU time with spinning threads and
    25 s with sleeping ones. Their number is given where a quota limits it, since the library only knows the affinity.
    """
    found = {"OMP_WAIT_POLICY": "PASSIVE"}
    return {**found, "OMP_NUM_THREADS": str(available_cores())} if cpu_quota() is not None else found


def available_cores() -> int:
    """Number of logical cores that this process may use, at least 1. A fraction of a core that is left over is none."""
    quota = cpu_quota()
    return _affinity() if quota is None else max(1, min(_affinity(), math.floor(quota)))


def threads_for(wanted: int) -> int:
    """Number of threads for a runtime.

    Args:
        wanted: What the user asks for; 0 leaves it to the runtime.

    Returns:
        `wanted`, or the number of cores that this process may use if it may not use all of the machine. Otherwise 0,
        since runtimes know best which cores of a whole machine to use.
    """
    if wanted:
        return wanted
    import psutil

    available = available_cores()
    return available if available < (psutil.cpu_count(logical=False) or os.cpu_count() or 1) else 0


def threads_of_each(jobs: int) -> int:
    """Number of threads of each of `jobs` processes that share the cores: at most OMP_NUM_THREADS, if that is set."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, available_cores() // jobs)
    return min(share, int(given)) if given.isdigit() and int(given) else share


def should_spin() -> bool:
    """Whether threads of a runtime may spin while they wait for work, which is faster on cores that are theirs.

    They should not where other processes want the cores, and where a quota counts the time of a spinning thread.
    """
    # This process may itself count as one in the load of the last minute, so the load must exceed the cores.
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > available_cores()
    return not busy and cpu_quota() is None


@functools.cache
def cpu_quota() -> float | None:
    """Cores' worth of time that control groups (versions 1 and 2) grant this process; None if there is no limit.

    The limits of all groups from its own up to the root apply. Inside of a container the root is that of the container.
    """
    limits = [limit for group in control_groups("cpu") if (limit := _limit(group)) is not None]
    return min(limits, default=None)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _limit(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
            return None if quota == "max" else int(quota) / int(period)
        quota = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8")
        return None if int(quota) <= 0 else int(quota) / int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    return None
