"""Denormal floats as zeros while a kernel runs. Imports no torch.

Softmax of ONNX Runtime computes exp of the lowest float for every slot that is masked. The result is 0, but on x86 each
such vector takes the processor's slow path for denormal numbers, unless these are off: then attention of a prompt of
512 tokens takes half the time. ONNX Runtime's option turns them off in the threads of a session, and for good in the
thread that opens a process's first session, where Python's own floats would change with it. So that thread gets its
settings back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import sys
from collections.abc import Iterator
from typing import Any

SIZE, CONTROL = 32, 28
"""Size of `fenv_t` of glibc on x86-64 in bytes, and the offset of the control register of SSE in it."""
DENORMALS_ARE_ZERO, FLUSH_TO_ZERO = 1 << 6, 1 << 15
"""Bits of that register: denormal operands are zeros, and so are denormal results."""


@functools.cache
def _library() -> Any:
    """The C library with `fegetenv` and `fesetenv`, or None where their structure is not known."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libm.so.6")


def can_flush_denormals() -> bool:
    """Whether `denormals_as_zeros` has an effect on this system."""
    return _library() is not None


@contextlib.contextmanager
def denormals_as_zeros() -> Iterator[None]:
    """Take denormal floats as zeros in this thread inside the block; afterwards its settings are what they were."""
    library = _library()
    if library is None:
        yield
        return
    before = ctypes.create_string_buffer(SIZE)
    library.fegetenv(before)
    inside = ctypes.create_string_buffer(before.raw, SIZE)
    control = ctypes.c_uint32.from_buffer(inside, CONTROL)
    control.value |= DENORMALS_ARE_ZERO | FLUSH_TO_ZERO
    library.fesetenv(inside)
    try:
        yield
    finally:
        library.fesetenv(before)
