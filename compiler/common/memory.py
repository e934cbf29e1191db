"""Whether there is room to compile, and what becomes of memory that is freed. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

from moec.compiler.common.errors import OutOfMemoryError

ADDRESS_SPACE = 3 << 29
"""What an export maps before it has read a weight, in bytes: torch, transformers and a runtime."""

KEPT = 128 << 20
"""Most bytes that are kept."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 << 20
"""The largest of glibc on 64 bits: DEFAULT_MMAP_THRESHOLD_MAX in malloc.c."""


def check_address_space() -> None:
    """Refuse to compile under a limit (`ulimit -v`, RLIMIT_AS) that the libraries alone exceed.

    With too little the C library ends the process where a library's thread-local data finds no room, or an import
    tries again and again: neither can be caught when it comes to that.

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
            f"this process may map {limit / 2**30:.2f} GiB, and the libraries alone take {ADDRESS_SPACE / 2**30}",
            hint="raise the limit (ulimit -v); the memory of a container is limited without it",
        )


def keep_freed_memory() -> None:
    """Let the C library keep up to 128 MB that was freed, for the tensors that come next.

    Else glibc hands the memory of every large tensor back to the kernel, which clears each page of it for the next one.
    Where experts are read one after the other, that took a seventh of the CPU time. Another C library is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, KEPT)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Let the garbage collector run more rarely, for a trace: of the objects that it makes, most live until its end.

    The thresholds are those of the process, and are set back at the end. With the defaults it takes 6 to 9 % of the CPU
    time of a capture; without it the peak of memory is a fifth higher.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
