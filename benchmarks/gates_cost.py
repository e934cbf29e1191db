"""What the gates of an export cost in CPU time, of one or several checkouts of moec in alternation.

    python benchmarks/gates_cost.py CHECKPOINT [--baseline CHECKOUT [--baseline-checkpoint DIR]] [--rounds 3]

Each export runs in a process of its own, with its gates and without; the difference of the medians is what the gates
take. CHECKOUT is a directory with the files of another commit, which runs with the libraries of this environment.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

RUN = "import sys; from moec.cli import main; main()"


def cpu_seconds(checkout: Path, arguments: list[str]) -> float:
    """User and system time of a command of moec, its child processes included."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "moec").symlink_to(checkout.resolve())
        environment = {**os.environ, "PYTHONPATH": temporary}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", RUN, "export", *arguments, "-q", "-o", f"{temporary}/out"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"  {checkout.name} {' '.join(arguments)}: exit code {done.returncode}", flush=True)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--baseline", type=Path, help="checkout of the other commit")
    parser.add_argument("--baseline-checkpoint", type=Path, help="what it exports (default: CHECKPOINT)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", default="onnx")
    options = parser.parse_args()
    print(describe())
    sides = {"this checkout": (Path(__file__).parents[1], options.checkpoint)}
    if options.baseline:
        sides["baseline"] = (options.baseline, options.baseline_checkpoint or options.checkpoint)
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.rounds):
        for gates in (True, False):
            for name, (checkout, checkpoint) in sides.items():
                arguments = [str(checkpoint), "--target", options.target, *([] if gates else ["--no-gates"])]
                times.setdefault((name, gates), []).append(cpu_seconds(checkout, arguments))
    print("\n| checkout | export with gates, CPU s | without | gates | ratio |\n|---|---|---|---|---|")
    taken = {}
    for name in sides:
        whole, bare = (statistics.median(times[name, gates]) for gates in (True, False))
        taken[name] = whole - bare
        ratio = taken["this checkout"] / taken[name]
        print(f"| {name} | {whole:.1f} | {bare:.1f} | {taken[name]:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
