"""A matrix of 12 cells, one of which cannot be built: killed during the run, resumed, and run from the cache.

    python benchmarks/matrix.py [--jobs 1] [--work DIRECTORY]

It has two tiny models, one of them without a tokenizer, with six routing settings each. One setting is fitted on text,
which needs a tokenizer, so there are 11 artifacts and one failure. Prints a line of JSON; fails on any other result.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from machine import describe

from moec.compiler.common.artifact import verify
from moec.compiler.families.tiny_models import write_tiny_checkpoint

MATRIX = """
models: {{whole: {whole}, mute: {mute}}}
targets: [onnx]
routing:
  full: off
  lean-90: {{policy: top-p, parameters: {{mass: 0.9}}}}
  lean-80: {{policy: top-p, parameters: {{mass: 0.8}}}}
  lean-70: {{policy: top-p, parameters: {{mass: 0.7}}}}
  lean-60: {{policy: top-p, parameters: {{mass: 0.6}}}}
  fitted: {{policy: top-p, budget: 0.7}}
"""
MARK = "MOEC_BENCHMARK_MATRIX"
"""Environment variable that identifies the worker processes of a run."""
BAD = "mute-onnx-fitted"


def command(matrix: Path, work: Path, jobs: int) -> list[str]:
    program = [sys.executable, "-c", "from moec.cli import main; main()"]
    places = ["-o", str(work / "out"), "--cache", str(work / "cache")]
    return [*program, "build", str(matrix), *places, "--jobs", str(jobs), "--json", "-q"]


def build(matrix: Path, work: Path, jobs: int) -> dict[str, Any]:
    started = time.perf_counter()
    done = subprocess.run(command(matrix, work, jobs), capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert done.returncode == found["exit_code"] == cells[BAD]["exit_code"] == 10, (done.returncode, found, done.stderr)
    assert [name for name, cell in cells.items() if cell["status"] == "failed"] == [BAD], found
    assert len(cells) == 12
    for name in cells:
        if name == BAD:
            assert not (work / "out" / name).exists()
        else:
            verify(work / "out" / name)
    return {"seconds": time.perf_counter() - started, "cells": cells}


def killed(matrix: Path, work: Path, jobs: int, after: int) -> list[str]:
    """Kill the command with SIGKILL once `after` cells are built; returns the cells that were built."""
    summary = work / "out" / "summary.json"
    with subprocess.Popen(command(matrix, work, jobs), stdout=subprocess.DEVNULL) as process:
        cells: list[dict[str, str]] = []
        while process.poll() is None:
            time.sleep(0.2)
            cells = json.loads(summary.read_text())["cells"] if summary.exists() else []
            if len(cells) >= after:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    # A worker only notices that its input has ended when it next runs Python code.
    workers = [process for process in psutil.process_iter() if _environment(process).get(MARK) == str(work)]
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, f"still running: {alive}"
    return [cell["name"] for cell in cells if cell["status"] == "built"]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        os.environ[MARK] = str(work)
        whole = write_tiny_checkpoint("olmoe", work / "whole", tokenizer=True)
        mute = write_tiny_checkpoint("olmoe", work / "mute")
        matrix = work / "matrix.yaml"
        matrix.write_text(MATRIX.format(whole=whole, mute=mute))
        before = killed(matrix, work, options.jobs, after=4)
        second = build(matrix, work, options.jobs)
        kept = [name for name, cell in second["cells"].items() if cell["status"] == "cached"]
        assert set(before) <= set(kept), f"lost: {set(before) - set(kept)}"
        third = build(matrix, work, options.jobs)
        hits = [cell["seconds"] for cell in third["cells"].values() if cell["status"] == "cached"]
        assert len(hits) == 11
        result = {
            "cells": 12,
            "artifacts": 11,
            "failure": third["cells"][BAD]["summary"],
            "built_before_kill": len(before),
            "lost_by_kill": 0,
            "rerun_after_kill_seconds": round(second["seconds"], 1),
            "all_cached_seconds": round(third["seconds"], 2),
            "slowest_hit_seconds": round(max(hits), 4),
            "machine": describe(),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
