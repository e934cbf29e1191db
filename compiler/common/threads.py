"""How threads wait for work, which on a shared machine decides what an export costs. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping

WAIT_WITHOUT_SPINNING: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of a process whose threads of torch are to sleep while they wait.

Its OpenMP library reads the variable once, when it is loaded, and has no function for it. Threads that spin take the
core that the one they wait for needs: beside four busy processes on two cores the export of the golden model took 110 s
of CPU time with spinning threads and 25 s with sleeping ones.
"""


def is_shared() -> bool:
    """Whether other processes keep the cores busy that this one may use: then a runtime's threads should not spin."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # This process has run for less than a minute or is one of those that count, hence strictly more.
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > cores
