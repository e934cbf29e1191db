"""Time and memory for building a TensorRT engine, by layers, experts and precision.

    python benchmarks/tensorrt_build.py [--work DIR] [--only 8x32]

The largest model is the 1.0 GB checkpoint of checkpoints.py. Time is the wall time of the builder's process, and memory
its peak anonymous memory, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import random_checkpoint
from machine import describe

SHAPES = ((2, 8), (8, 8), (2, 32), (4, 32), (8, 32))
PRECISIONS = {"fp16": (), "int8": ("--quantize", "int8:channel"), "int4": ("--quantize", "int4:64")}
COMMON = ("--target", "tensorrt", "--dtype", "fp16", "--rounding", "rtn", "--no-gates", "--quiet", "--overwrite")
PEAK = re.compile(r"peak memory (\d+) bytes, ([\d.]+) s")


def measure(checkpoint: Path, output: Path, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Export, and read time and memory from the build's log."""
    command = [sys.executable, "-m", "moec.cli", "export", str(checkpoint), "-o", str(output), *COMMON, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    peak, seconds = PEAK.findall((output / "build.log").read_text())[-1]
    built = json.loads((output / "tensorrt.json").read_text())["built"]
    return {
        "data": (output / "model.onnx_data").stat().st_size / 1e9,
        "engine": built["engine_bytes"] / 1e9,
        "seconds": float(seconds),
        "peak": int(peak) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoints")
    parser.add_argument("--only", action="append", help="LAYERSxEXPERTS, such as 8x32")
    parser.add_argument("--precision", action="append", choices=tuple(PRECISIONS))
    parser.add_argument("--experts", default="auto", help="how experts are computed: --experts of the target")
    options = parser.parse_args()
    print(describe())
    print("\n| layers x experts | precision | weights, GB | engine, GB | build, s | peak memory, GB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        for layers, experts in SHAPES:
            name = f"{layers}x{experts}"
            if options.only and name not in options.only:
                continue
            where = (options.work or Path(temporary)) / f"olmoe-{name}"
            checkpoint = random_checkpoint(where, num_hidden_layers=layers, num_experts=experts)
            for precision in options.precision or PRECISIONS:
                arguments = (*PRECISIONS[precision], "--experts", options.experts)
                row = measure(checkpoint, Path(temporary) / "out", arguments)
                figures = f"{row['data']:.2f} | {row['engine']:.2f} | {row['seconds']:.0f} | {row['peak']:.2f}"
                print(f"| {name} | {precision} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
