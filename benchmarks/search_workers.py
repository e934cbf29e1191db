"""A search that loses a worker on Ray, and one that is killed itself: `python benchmarks/search_workers.py`.

The same search runs in this process, on Ray, where one worker is killed after half of the measurements, and as `moec
search`, which is ended with SIGKILL at random moments and resumed. The table says whether anything was lost, and
whether all fronts are the same.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pages
import psutil
from arguments import add_flags
from machine import describe

from moec.compiler.common import markdown
from moec.compiler.common.progress_bars import no_progress_bars
from moec.compiler.families.tiny_models import character_tokenizer, tiny_model
from moec.compiler.search.session import Finished, open_search, run_search
from moec.compiler.search.settings import make_settings
from moec.compiler.search.store import SUFFIX

OBJECTIVES = "perplexity,expert-flops,size"
WORKER = "ray::_Actor"
"""What the command line of a worker contains."""


def silent(*_: Any) -> None:
    """Shows nothing."""


def tiny_checkpoint(directory: Path) -> Path:
    """A model with random weights of which a measurement takes milliseconds."""
    model = tiny_model("olmoe", intermediate_size=64, num_experts_per_tok=4)
    with no_progress_bars():
        model.save_pretrained(directory)
    character_tokenizer(model.config.vocab_size).save(str(directory / "tokenizer.json"))
    return directory


def measurements(folder: Path) -> int:
    """Lines of the stored measurements so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"*{SUFFIX}"))


class Killer(threading.Thread):
    """Kills one worker of Ray once a directory has as many measurements as given."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(daemon=True)
        self._folder, self._after = folder, after
        self.killed: list[int] = []

    def run(self) -> None:
        """See the class."""
        while measurements(self._folder) < self._after:
            time.sleep(0.01)
        every = psutil.process_iter(["cmdline"])
        workers = [process for process in every if WORKER in " ".join(process.info["cmdline"] or [])]
        workers[0].kill()
        self.killed.append(workers[0].pid)


def search(arguments: argparse.Namespace, checkpoint: Path, folder: Path, executor: str) -> tuple[Finished, float]:
    """The finished search, and its seconds."""
    fields = {
        "checkpoint": str(checkpoint),
        "target": "onnx",
        "objectives": OBJECTIVES,
        "population": arguments.population,
        "generations": arguments.generations,
        "windows": arguments.windows,
    }
    found = open_search(make_settings(fields), folder, silent)
    started = time.perf_counter()
    jobs = arguments.workers if executor == "ray" else 1
    done = run_search(found, folder, executor=executor, jobs=jobs, store=folder / "store", progress=silent)
    return done, time.perf_counter() - started


def resumed(arguments: argparse.Namespace, checkpoint: Path, folder: Path, total: int) -> tuple[Finished, float, int]:
    """A search that was ended at random moments and resumed, its seconds, and how often it was ended.

    Args:
        arguments: Those of this program.
        checkpoint: The model.
        folder: Directory of the search.
        total: Number of measurements of the whole search.
    """
    moments = sorted(random.Random(arguments.seed).sample(range(1, total), arguments.kills))
    command = [sys.executable, "-m", "moec", "search", str(checkpoint), "--target", "onnx", "-o", str(folder)]
    command += ["--objectives", OBJECTIVES, "--members", "0", "--store", str(folder / "store")]
    for name in ("population", "generations", "windows"):
        command += [f"--{name}", str(getattr(arguments, name))]
    started, ended = time.perf_counter(), 0
    for moment in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and measurements(folder / "store") < moment:
            time.sleep(0.01)
        process.kill()
        ended += process.wait() == -signal.SIGKILL
        command = [sys.executable, "-m", "moec", "search", str(folder), "--resume", "--store", str(folder / "store")]
    done, _ = search(arguments, checkpoint, folder, "local")
    return done, time.perf_counter() - started, ended


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, checkpoint="", population=300, generations=3, windows=8, workers=4, kills=5, seed=0, page="")
    arguments = parser.parse_args()
    about, rows, fronts = describe(), [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else tiny_checkpoint(folder / "checkpoint")

        def tell(what: str, done: Finished, seconds: float, killed: int) -> None:
            archive = done.search.archive
            fronts.append([(item.genome, archive.row(item.values)) for item in archive.front])
            counted = (len(done.search.seen), len(archive.found), done.lost, len(fronts[-1]), killed)
            rows.append([what, *map(str, counted), f"{seconds:.0f}"])

        tell("in this process", *search(arguments, checkpoint, folder / "local", "local"), 0)
        total = measurements(folder / "local" / "store")
        killer = Killer(folder / "ray" / "store", total // 2)
        killer.start()
        done, seconds = search(arguments, checkpoint, folder / "ray", "ray")
        tell(f"{arguments.workers} workers on Ray", done, seconds, len(killer.killed))
        tell("`moec search`, resumed", *resumed(arguments, checkpoint, folder / "killed", total))
    header = ["", "individuals", "measured", "lost", "front", "killed", "seconds"]
    same = "All fronts are the same." if all(front == fronts[0] for front in fronts) else "THE FRONTS DIFFER."
    text = f"{markdown.table(header, rows)}\n\n{same}\n\n{about}"
    print(text)
    if arguments.page:
        pages.put(text, Path(arguments.page), name="workers")


if __name__ == "__main__":
    main()
