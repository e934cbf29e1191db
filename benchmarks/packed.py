"""What packed weights (`moec pack`) gain: opening, memory, decode and prefill, on one thread.

    python benchmarks/packed.py [ARTIFACT] [--layers 2] [--rounds 7] [--starts 5] [--work DIR]

Without an artifact, a random OLMoE of the widths of `checkpoints.BASE` with so many layers is exported in int4.
Artifact and packed copy are opened in new processes in turn: medians of CPU and wall-clock time and of anonymous
memory, after opening and after a prompt of 128 tokens. Then one process has both open and runs them alternately, as
`speed.py` does. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import random_checkpoint
from speed import PROMPT, Moec, compare


def anonymous_mb() -> float:
    """Anonymous memory of this process in MB: what is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def start(directory: str) -> None:
    """Open an artifact in this process and print its figures as JSON."""
    import onnxruntime  # noqa: F401 - not part of opening

    from moec.targets import get_target

    target, before = get_target("onnx"), anonymous_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    runner = target.open(Path(directory), threads=1)
    figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "open": anonymous_mb() - before}
    runner.prefill(np.random.default_rng(0).integers(3, 4000, (1, PROMPT)))
    print(json.dumps({**figures, "run": anonymous_mb() - before}))


def opening(directories: dict[str, Path], starts: int) -> None:
    """Print a table of openings, in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in directories}
    for turn in range(starts + 1):  # the first one reads the files
        for name, directory in directories.items():
            command = [sys.executable, __file__, str(directory), "--start"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            if turn:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("| weights | files, MB | open, s | CPU s | anonymous MB | after a prompt |\n|---|---|---|---|---|---|")
    for name, rows in found.items():
        size = sum(file.stat().st_size for file in directories[name].glob("model*")) / 1e6
        cells = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(
            f"| {name} | {size:.0f} | {cells['wall']:.2f} | {cells['cpu']:.2f} | {cells['open']:.0f} | "
            f"{cells['run']:.0f} |"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where to keep checkpoint and artifacts")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.artifact)
        return
    from moec.compiler.api import export
    from moec.compiler.run.packing import pack_into

    with tempfile.TemporaryDirectory() as temporary:
        work, plain = options.work or Path(temporary), options.artifact
        if plain is None:
            plain = work / f"int4-{options.layers}"
            if not plain.is_dir():
                checkpoint = random_checkpoint(work / f"layers-{options.layers}", num_hidden_layers=options.layers)
                quantize = {"format": "int4", "rounding": "rtn"}
                export(checkpoint, target="onnx", output=plain, gates=False, quantize=quantize)
        packed = work / "packed"
        began = time.perf_counter()
        pack_into(plain, packed, lambda *_: None, overwrite=True)
        print(f"packing and comparing took {time.perf_counter() - began:.1f} s")
        directories = {"as they are": plain, "packed": packed}
        opening(directories, options.starts)
        compare({name: partial(Moec, str(directory)) for name, directory in directories.items()}, options.rounds)


if __name__ == "__main__":
    main()
