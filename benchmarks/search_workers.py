"""A search on Ray that loses a worker: `python benchmarks/search_workers.py`.

The same search runs in this process and on Ray, where one worker is killed after half of the measurements. The table
says whether anything was lost, and whether both fronts are the same.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from arguments import add_flags
from machine import describe

from moec.compiler.common import markdown
from moec.compiler.common.progress_bars import no_progress_bars
from moec.compiler.families.tiny_models import character_tokenizer, tiny_model
from moec.compiler.search.session import Finished, open_search, run_search
from moec.compiler.search.settings import make_settings
from moec.compiler.search.store import SUFFIX

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
        "objectives": "perplexity,expert-flops,size",
        "population": arguments.population,
        "generations": arguments.generations,
        "windows": arguments.windows,
        "window": arguments.window,
    }
    found = open_search(make_settings(fields), folder, silent)
    started = time.perf_counter()
    jobs = arguments.workers if executor == "ray" else 1
    done = run_search(found, folder, executor=executor, jobs=jobs, store=folder / "store", progress=silent)
    return done, time.perf_counter() - started


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, checkpoint="", population=300, generations=3, windows=8, window=32, workers=4)
    arguments = parser.parse_args()
    about, rows, fronts = describe(), [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else tiny_checkpoint(folder / "checkpoint")
        killer: Killer | None = None
        for executor in ("local", "ray"):
            if executor == "ray":
                killer = Killer(folder / "ray" / "store", measurements(folder / "local" / "store") // 2)
                killer.start()
            done, seconds = search(arguments, checkpoint, folder / executor, executor)
            archive = done.search.archive
            fronts.append([(item.genome, archive.row(item.values)) for item in archive.front])
            counted = (len(done.search.seen), len(archive.found), done.lost, len(fronts[-1]))
            gone = len(killer.killed) if killer else 0
            rows.append([executor, *map(str, counted), str(gone), f"{seconds:.0f}"])
    header = ["workers", "individuals", "measured", "lost", "front", "killed", "seconds"]
    same = "the same front" if fronts[0] == fronts[1] else "ANOTHER FRONT"
    print(f"{markdown.table(header, rows)}\n\n{same}\n\n{about}")


if __name__ == "__main__":
    main()
