"""Settings of this process that concern memory: limits, the allocator and the garbage collector.

Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
from collections.abc import Iterator
from pathlib import Path

from moec.compiler.common.errors import OutOfMemoryError

ADDRESS_SPACE = 3 << 29
"""Bytes of address space that an export maps before it reads a weight: torch, transformers and a runtime."""

STATM = Path("/proc/self/statm")

KEPT = 128 << 20
"""Bytes of freed memory that the C library may keep."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MAPPED_BUFFERS = 65536
"""How many buffers glibc maps by themselves unless it is told otherwise: DEFAULT_MMAP_MAX in malloc.c."""
_MOST = (1 << 31) - 1
"""The largest value that mallopt takes: an int."""
_LARGEST_THRESHOLD = 32 << 20
"""The largest value that glibc accepts on 64 bits: DEFAULT_MMAP_THRESHOLD_MAX in malloc.c."""


def check_address_space() -> None:
    """Refuse to compile under a limit (`ulimit -v`, RLIMIT_AS) that the libraries alone exceed.

    Below it, the C library aborts the process when there is no room for a library's thread-local data, or an import
    retries without end. Neither can be caught later.

    Raises:
        OutOfMemoryError: The limit of this process is below `ADDRESS_SPACE`.
    """
    try:
        import resource
    except ImportError:  # no such limit on Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE:
        raise OutOfMemoryError(
            f"this process may map {limit / 2**30:.2f} GiB, and the libraries alone take {ADDRESS_SPACE / 2**30} GiB",
            hint="raise the limit (ulimit -v); to limit memory, use the limit of a container",
        )


def resident_bytes() -> tuple[int, int]:
    """Bytes of this process that are in memory: what is its own, and pages of files. Linux only.

    Raises:
        OSError: There is no /proc.
    """
    _, resident, of_files, *_ = (int(item) * mmap.PAGESIZE for item in STATM.read_text(encoding="ascii").split())
    return resident - of_files, of_files


def keep_freed_memory() -> None:
    """Let glibc keep up to `KEPT` bytes of freed memory for the next tensors. Other C libraries are left alone.

    By default glibc returns the memory of every large tensor to the kernel, which clears each page before its next use.
    Where experts are read one after the other, that took a seventh of the CPU time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, KEPT)


@contextlib.contextmanager
def reusing_freed_memory() -> Iterator[None]:
    """Let large buffers that follow one another share memory, which is returned at the end. Only glibc does so.

    By default glibc maps a buffer of 32 MiB or more anew each time, and the kernel clears each page on its first use.
    Afterwards memory is kept as `keep_freed_memory` says: glibc cannot be asked what it did before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _MOST)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, _MAPPED_BUFFERS)
        keep_freed_memory()
        return_freed_memory()


def return_freed_memory() -> None:
    """Let glibc return freed memory to the kernel. Other C libraries are left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def fewer_garbage_collections() -> Iterator[None]:
    """Let the garbage collector run less often, for a trace or the gates, which keep most objects that they make.

    The thresholds are those of the process and are restored at the end. With the default thresholds the collector takes
    6 to 9 % of the CPU time of a capture and a fifth of that of the gates (olmoe-tiny), visiting all of torch;
    without a collector the peak of memory of a capture is a fifth higher.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
