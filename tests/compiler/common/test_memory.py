"""Memory of large tensors is kept for the next one, and not cleared anew by the kernel."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from moec.compiler.common.memory import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    first, second, third = (b'x' * (16 << 20) for _ in range(3))
    del first, second, third
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 3 * (16 << 20) // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_used_again() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", SCRIPT, *more], capture_output=True, check=True, text=True).stdout)
        for more in ([], ["keep"])
    ]
    assert faults[0] > 10 * PAGES
    assert faults[1] < 2 * PAGES


REUSING = """
import contextlib, resource, sys
from moec.compiler.common.memory import resident_bytes, reusing_freed_memory
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with reusing_freed_memory() if "reuse" in sys.argv else contextlib.nullcontext():
    for size in (64 << 20, 48 << 20) * 5:
        b'x' * size
faults, held = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, resident_bytes()[0]
b'x' * (64 << 20)
print(faults, held, resident_bytes()[0])
"""
"""Buffers that glibc maps anew each time, whatever its thresholds are."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_large_buffers_share_memory_that_is_returned() -> None:
    default, reused = (
        [
            int(word)
            for word in subprocess.run(
                [sys.executable, "-c", REUSING, *more], capture_output=True, check=True, text=True
            ).stdout.split()
        ]
        for more in ([], ["reuse"])
    )
    pages = (64 << 20) // 4096
    assert default[0] > 8 * pages
    assert reused[0] < 2 * pages
    for held in reused[1:]:
        assert held < default[1] + (8 << 20), "what was freed is not returned, or buffers are no longer mapped"
