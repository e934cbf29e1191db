"""How threads wait for work, which decides the CPU time of an export on a shared machine. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping

WAIT_WITHOUT_SPINNING: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment variables that make torch's threads sleep while they wait.

The OpenMP library of torch reads the variable once, when it is loaded, and has no function to set it later. A spinning
thread occupies the core that the thread it waits for needs: beside four busy processes on two cores, the export of the
golden model took 110 s of CPU time with spinning threads and 25 s with sleeping ones.
"""


def is_machine_busy() -> bool:
    """Whether other processes keep this process's cores busy, so that a runtime's threads should not spin."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # This process may itself count as one in the load of the last minute, so the load must exceed the cores.
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > cores
