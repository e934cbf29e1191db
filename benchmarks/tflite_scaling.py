"""Cost of lowering to TFLite by layers x experts: time, memory, subgraphs, and the cost of opening the file.

    python benchmarks/tflite_scaling.py [--sizes 2x8,4x16,8x32,16x64] [--prefill 32]

Each size is a random Mixtral of hidden size 256 and expert width 64, built, captured and measured in a separate
process. The memory of the runtime is the growth of the process since before the file was opened.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from machine import describe

MEGABYTE = 1e6


def memory() -> float:
    """Resident memory of this process in MB."""
    return float(psutil.Process().memory_info().rss) / MEGABYTE


def measure(layers: int, experts: int, prefill: int) -> dict[str, float]:
    import torch

    from moec.compiler.families.tiny_models import tiny_model
    from moec.compiler.frontend.capture import capture
    from moec.compiler.frontend.checkpoint import Checkpoint
    from moec.passes import default_passes, run_passes
    from moec.targets.tflite import lower
    from moec.targets.tflite.runner import TfliteRunner
    from moec.targets.tflite.writer import write

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": layers, "num_local_experts": experts}
        tiny_model("mixtral", **sizes).save_pretrained(folder)
        program, _ = run_passes(capture(Checkpoint.open(folder)), default_passes())
        before, start, cpu = memory(), time.perf_counter(), time.process_time()
        model, _ = lower.build(program, lengths=(1, prefill), capacity=64, branches=True)
        file = Path(folder) / "model.tflite"
        size = write(model, file, lambda *_: None)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        grown, subgraphs = memory() - before, len(model.graphs())
        weights = sum(weight.total_bytes for weight in model.weights())
        del model
        before, start = memory(), time.perf_counter()
        runner = TfliteRunner(file, threads=1)
        opening, opened = time.perf_counter() - start, memory() - before
        runner.decode(np.zeros((1, 1), np.int64))
        decoded = memory() - before
        runner.prefill(np.zeros((1, prefill), np.int64))
        prefilled = memory() - before
        return {
            "subgraphs": subgraphs,
            "file MB": size / MEGABYTE,
            "graph MB": (size - weights) / MEGABYTE,
            "lowering s": seconds,
            "CPU s": cpu,
            "memory growth MB": grown,
            "open s": opening,
            "memory after opening MB": opened,
            "memory after decode MB": decoded,
            "memory after prefill MB": prefilled,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2x8,4x16,8x32,16x64")
    parser.add_argument("--prefill", type=int, default=32)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        layers, experts = map(int, options.sizes.split("x"))
        print(json.dumps(measure(layers, experts, options.prefill)))
        return
    print(describe())
    for index, size in enumerate(options.sizes.split(",")):
        command = [sys.executable, __file__, "--one", "--sizes", size, "--prefill", str(options.prefill)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        if index == 0:
            print("\n| layers x experts | " + " | ".join(found) + " |\n" + "|---" * (len(found) + 1) + "|")
        print(f"| {size} | " + " | ".join(f"{value:.3g}" for value in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
