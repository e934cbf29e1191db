"""Commands under a real limit of the address space: a message and exit code 10, and nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="Windows has no such limit")

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), -1))
from moec.cli import dispatch
sys.exit(dispatch(sys.argv[2:]))
"""
"""Runs a command line with so many bytes of address space."""

SHORT = """
import resource, sys
import torch
from pathlib import Path
from moec.cli import dispatch
from moec.compiler.pipeline import export
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), -1))
export.compile_recipe = lambda *_, **__: torch.empty(2 * int(sys.argv[1]), dtype=torch.uint8)
sys.exit(dispatch(sys.argv[2:]))
"""
"""Runs a command line whose export asks for a tensor of twice the address space that is left.

A limit that small objects meet first is not for a test: libraries in C then end the process wherever they are.
"""


def run(script: str, space: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(space), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("command", ["export", "validate", "calibrate", "families"])
def test_a_limit_that_the_libraries_exceed_is_refused_before_they_are_loaded(
    golden_model: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    arguments = {
        "export": [str(golden_model), "--target", "onnx", "-o", str(out)],
        "validate": [str(out), "--against", str(golden_model)],
        "calibrate": [str(golden_model), "--policy", "top-p", "--budget", "0.5", "-o", str(out)],
        "families": ["olmoe", "--check"],
    }[command]
    done = run(LIMITED, 1 << 30, [command, *arguments])
    assert done.returncode == 10, done.stderr
    assert "may map 1.00 GiB" in done.stderr
    assert "ulimit -v" in done.stderr
    assert not out.exists()


def test_commands_that_compile_nothing_run_under_the_limit(tmp_path: Path) -> None:
    done = run(LIMITED, 1 << 30, ["verify", str(tmp_path)])
    assert done.returncode == 9, done.stderr
    assert "moec.json" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what is mapped is read from /proc")
def test_memory_that_runs_out_in_an_export(golden_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(SHORT, 1 << 30, ["export", str(golden_model), "--target", "onnx", "-o", str(out), "-q"])
    assert done.returncode == 10, done.stderr
    assert "not enough memory" in done.stderr
    assert list(tmp_path.iterdir()) == []
