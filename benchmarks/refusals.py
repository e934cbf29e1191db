"""Time until `moec export` refuses what cannot work, on a checkpoint of the size of a released model.

    python benchmarks/refusals.py [--rounds 3]

The checkpoint has the shape of OLMoE-1B-7B (13.8 GB in bfloat16) in a sparse file, since nothing reads its weights.
Each command line is run in a process of its own; the wall time and the CPU time of the process are printed, each the
median over `--rounds`, with its exit code. A command line that is not refused within a minute is stopped and named.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import hollow_checkpoint
from machine import describe

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
}
"""config.json of allenai/OLMoE-1B-7B-0924."""
CASES: dict[str, tuple[str, ...]] = {
    "an unknown flag": ("-t", "onnx", "--quantise", "int4"),
    "an unknown target": ("-t", "onx"),
    "an unknown value of an option": ("-t", "onnx", "--flavor", "fast"),
    "an unknown format": ("-t", "onnx", "--quantize", "int9"),
    "a block size that is none": ("-t", "onnx", "--quantize", "int4:7"),
    "a cache beyond the context, with GPTQ": ("-t", "coreml", "--quantize", "int4", "--context", "99999"),
    "a prompt beyond the cache": ("-t", "tflite", "--context", "64", "--prefill", "128"),
    "a policy without a budget": ("-t", "onnx", "--routing", "threshold"),
    "a latency budget that is none": ("-t", "onnx", "--latency-budget", "decode.p50=fast"),
    "a calibration text that is missing": ("-t", "onnx", "--quantize", "int4", "--calibration", "no.txt"),
    "an execution provider without genai": ("-t", "onnx", "--provider", "cuda"),
    "an output that is a file": ("-t", "onnx", "-o", "file"),
    "a missing extra": ("-t", "coreml"),
}
CODE = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "coremltools" and {hidden} else found(name, *rest)
from moec.cli import main
main()
"""
"""`moec` in an environment with CoreML's extra, or as if without."""
LIMIT = 60


def refuse(checkpoint: Path, flags: tuple[str, ...], work: Path) -> tuple[float, float, int, str]:
    """Wall and CPU seconds of one command line, its exit code and the first line that it says."""
    code = CODE.format(hidden=flags == CASES["a missing extra"])
    command = [sys.executable, "-c", code, "export", str(checkpoint), "-o", str(work / "out"), *flags]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=work, check=False)
        status, said = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        status, said = -1, f"not refused within {LIMIT} s"
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (
        wall,
        spent,
        status,
        next((line for line in said.splitlines() if line.startswith("error: ")), said.split("\n")[0]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = hollow_checkpoint(work / "checkpoint", **SHAPE)
        (work / "file").touch()
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        print(f"checkpoint of {size / 1e9:.1f} GB; {os.cpu_count()} cores")
        for name, flags in CASES.items():
            found = [refuse(checkpoint, flags, work) for _ in range(chosen.rounds)]
            wall, spent = statistics.median(each[0] for each in found), statistics.median(each[1] for each in found)
            print(f"{name}: {wall:.2f} s, {spent:.2f} s of CPU, exit code {found[0][2]}: {found[0][3]}")


if __name__ == "__main__":
    main()
