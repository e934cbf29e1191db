"""A description of this machine, which is recorded beside every measurement."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import psutil

CPU_INFO = Path("/proc/cpuinfo")
_VECTORS = re.compile(r"(s?sse|avx|amx|fma|f16c|asimd|sve|sme(?!p)|i8mm|bf16|fphp|gfni|vnni).*")


def machine() -> dict[str, Any]:
    """CPU, cores, memory in bytes, operating system and Python version of this machine."""
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 0,
        "logical_cores": psutil.cpu_count() or 0,
        "memory_bytes": int(psutil.virtual_memory().total),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """Name of the processor."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def instruction_set() -> tuple[str, ...]:
    """The architecture, and the vector and matrix extensions of the processor, by which runtimes choose kernels."""
    flags = (_cpu_field("flags") or _cpu_field("Features")).split()
    return (platform.machine(), *sorted(flag for flag in flags if _VECTORS.fullmatch(flag)))


def _cpu_field(name: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty if there is none."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""
