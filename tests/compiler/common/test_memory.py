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
