"""Cost of an export: CPU time and anonymous memory for a 1.0 GB checkpoint, and cost of capture by model size.

    python benchmarks/export_cost.py [--work DIR]
    python benchmarks/export_cost.py --large [--layers 16] [--work DIR]
    python benchmarks/export_cost.py --side-by-side 4 [--rounds 3]

The second form exports the shape of OLMoE-1B-7B to int4 with all gates. It needs 14 GB of disk beside the checkpoint.
The third exports the model of `make demo` alone and so many times at once, in turn.
Each measurement runs in a separate process. Memory is RssAnon from /proc, without pages of mapped files, which the
system can drop at any time; total RSS is printed beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import hollow_checkpoint, random_checkpoint, repeated_checkpoint
from machine import describe

CASES = {
    "fp32": ["--no-gates", "--dtype", "fp32"],
    "fp16": ["--no-gates", "--dtype", "fp16"],
    "int4, rounded to nearest": ["--no-gates", "--quantize", "int4", "--rounding", "rtn"],
}
SHAPES = ((8, 32), (16, 32), (32, 32), (64, 32), (8, 64), (8, 128), (64, 128))


def memory() -> dict[str, float]:
    """RssAnon and RSS of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return {name: int(value) * 1024 / 1e9 for name, value in fields.items()}


class Peak:
    """Samples the memory of this process every 5 ms."""

    def __enter__(self) -> Peak:
        """Start."""
        self.highest = {"RssAnon": 0.0, "VmRSS": 0.0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            for name, value in memory().items():
                self.highest[name] = max(self.highest[name], value)

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()


def _bare_imports() -> None:
    import onnx_ir
    import onnxruntime
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, OlmoeForCausalLM

    assert all((onnx_ir, onnxruntime, torch, transformers, AutoModelForCausalLM, OlmoeForCausalLM))


def measure_export(checkpoint: str, output: str, arguments: list[str]) -> dict[str, Any]:
    """Export in this process; returns CPU time, memory and the verdicts."""
    import torch

    torch.set_num_threads(1)
    _bare_imports()
    from moec.cli import dispatch

    before, start = memory(), time.process_time()
    with Peak() as peak:
        code = dispatch(["export", checkpoint, "--target", "onnx", "-o", output, "-q", *arguments])
    assert code == 0, code
    verdicts = json.loads(Path(output, "report.json").read_text())["verdicts"]
    return {
        "verdicts": {verdict["gate"]: verdict["status"] for verdict in verdicts},
        "cpu_s": time.process_time() - start,
        "imports_anon_gb": before["RssAnon"],
        "peak_anon_gb": peak.highest["RssAnon"],
        "peak_rss_gb": peak.highest["VmRSS"],
    }


def measure_capture(checkpoint: str, watched: str) -> dict[str, Any]:
    """Capture in this process and measure `watched`: CPU time or memory, since sampling memory costs CPU time."""
    import torch

    torch.set_num_threads(1)
    _bare_imports()
    from moec.compiler.frontend.capture import capture
    from moec.compiler.frontend.checkpoint import Checkpoint

    before, start = memory(), time.process_time()
    with Peak() if watched == "memory" else contextlib.nullcontext() as peak:
        program = capture(Checkpoint.open(checkpoint))
    if peak is not None:
        return {"anon_above_imports_gb": peak.highest["RssAnon"] - before["RssAnon"]}
    return {"cpu_s": time.process_time() - start, "nodes": len(program.graph.nodes)}


def _child(what: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_large(work: Path, layers: int) -> None:
    """Print what an export of the shape of OLMoE-1B-7B with `layers` layers costs, with all gates and without."""
    checkpoint = repeated_checkpoint(work / f"olmoe-{layers}-layers", num_hidden_layers=layers)
    print("\n| export to int4 | CPU s | peak anonymous GB | gates that passed | not run |\n|---|---|---|---|---|")
    for name, arguments in (("without gates", ["--no-gates"]), ("with all gates", [])):
        with tempfile.TemporaryDirectory(dir=work) as output:
            row = _child("export", str(checkpoint), str(Path(output) / "out"), "--quantize", "int4", *arguments)
        passed, left = (
            ", ".join(gate for gate, status in row["verdicts"].items() if status == wanted)
            for wanted in ("pass", "not run")
        )
        print(f"| {name} | {row['cpu_s']:.0f} | {row['peak_anon_gb']:.2f} | {passed} | {left} |", flush=True)


def measure_side_by_side(count: int, rounds: int) -> None:
    """Print the CPU time of an export of the golden model alone, and of each of `count` at once."""
    model = Path(__file__).parents[1] / "golden_models" / "olmoe-tiny"
    found: dict[int, list[float]] = {1: [], count: []}
    for _ in range(rounds):
        for together, seconds in found.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "moec", "export", str(model), "--target", "onnx", "-q", "-o"]
                running = [subprocess.Popen([*command, str(Path(folder) / str(i))]) for i in range(together)]
                for process in running:
                    _, status, usage = os.wait4(process.pid, 0)
                    process.returncode = os.waitstatus_to_exitcode(status)
                    assert process.returncode == 0, process.returncode
                    seconds.append(usage.ru_utime + usage.ru_stime)
    alone = statistics.median(found[1])
    print("\n| exports at once | CPU s of each | ratio |\n|---|---|---|")
    for together, seconds in found.items():
        ratios = [value / alone for value in (min(seconds), statistics.median(seconds), max(seconds))]
        print(f"| {together} | {statistics.median(seconds):.1f} | {ratios[1]:.2f} [{ratios[0]:.2f}, {ratios[2]:.2f}] |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoints")
    parser.add_argument("--large", action="store_true", help="export the shape of OLMoE-1B-7B with all gates")
    parser.add_argument("--layers", type=int, default=16, help="layers of that shape")
    parser.add_argument(
        "--side-by-side", type=int, default=0, metavar="N", help="export the golden model N times at once"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of exports side by side")
    parser.add_argument("--child", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.child:
        what, *arguments = options.child
        call = (
            measure_export(arguments[0], arguments[1], arguments[2:])
            if what == "export"
            else measure_capture(*arguments)
        )
        print(json.dumps(call))
        return
    print(describe())
    if options.side_by_side:
        measure_side_by_side(options.side_by_side, options.rounds)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.large:
            measure_large(work, options.layers)
            return
        checkpoint = random_checkpoint(work / "olmoe-1gb")
        print("\n| export of 1.0 GB bf16 | CPU s | anonymous GB above the imports | peak RSS, GB |")
        print("|---|---|---|---|")
        for name, arguments in CASES.items():
            row = _child("export", str(checkpoint), str(Path(temporary) / name.split(",")[0]), *arguments)
            above = row["peak_anon_gb"] - row["imports_anon_gb"]
            print(f"| {name} | {row['cpu_s']:.1f} | {above:.2f} | {row['peak_rss_gb']:.2f} |", flush=True)
        print("\n| layers | experts | capture CPU s | nodes | memory above the imports, GB |\n|---|---|---|---|---|")
        for layers, experts in SHAPES:
            hollow = hollow_checkpoint(
                Path(temporary) / f"{layers}x{experts}", num_hidden_layers=layers, num_experts=experts
            )
            row = _child("capture", str(hollow), "time") | _child("capture", str(hollow), "memory")
            print(
                f"| {layers} | {experts} | {row['cpu_s']:.1f} | {row['nodes']} | {row['anon_above_imports_gb']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
