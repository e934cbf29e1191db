"""Models of speed.py in processes of their own: from their opening on, or with the code of another checkout of moec."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import speed

RUNTIMES = ("moec.targets.onnx.runner", "moec.targets.onnx.target", "onnxruntime_genai", "llama_cpp")
"""Modules that are imported before a model is opened, where they are installed."""


def environment_of(checkout: Path | None, folder: Path) -> dict[str, str]:
    """Environment variables with which python imports `moec` from a checkout; `folder` gets a link to it."""
    if checkout is None:
        return dict(os.environ)
    link = folder / "moec"
    if not link.exists():
        link.symlink_to(checkout.resolve())
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


class Apart:
    """A model in a process of its own; see `speed.Model`.

    Args:
        kind: Name of its class in speed.py.
        path: The model.
        threads: Of the model.
        checkout: A checkout of moec whose code runs it; None: this one.
    """

    def __init__(self, kind: str, path: str, threads: int = 1, checkout: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind, path, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment_of(checkout, Path(self._folder.name)),
        )
        self._answer()

    def open(self) -> Apart:
        """Open the model."""
        self._ask("open")
        return self

    def prefill(self, ids: np.ndarray) -> None:
        self._ask("prefill", ids.tolist())

    def decode(self, ids: np.ndarray) -> None:
        self._ask("decode", ids.tolist())

    def cpu_seconds(self) -> float:
        """CPU time that the process has used so far."""
        return time.clock_gettime((~self._process.pid << 3) | 2)  # as clock_getcpuclockid(3) computes it

    def anonymous_mb(self) -> float:
        """Anonymous memory of the process in MB: what is no page of a file."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    __del__ = close

    def _ask(self, *request: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout
        while (line := self._process.stdout.readline()) != "done\n":
            assert line, f"the process of a model ended with {self._process.wait()}"


def serve(kind: str, path: str, threads: int) -> None:
    """Do what `Apart` asks for."""
    for name in RUNTIMES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    model: Any = None
    print("done", flush=True)
    for line in sys.stdin:
        what, *ids = json.loads(line)
        if what == "open":
            model = getattr(speed, kind)(path, threads)
        else:
            getattr(model, what)(np.array(*ids))
        print("done", flush=True)


@dataclass(frozen=True)
class Start:
    """What a model takes from its opening in a new process to the first token: seconds, CPU seconds, anonymous MB."""

    wall: float
    cpu: float
    opening: float
    opening_cpu: float
    open_mb: float
    mb: float

    @classmethod
    def of(cls, kind: str, path: str, threads: int) -> Start:
        """Open a model and feed it a prompt; imports do not count."""
        model = Apart(kind, path, threads)
        before, wall, cpu = model.anonymous_mb(), time.perf_counter(), model.cpu_seconds()
        model.open()
        opened, opened_cpu, memory = time.perf_counter(), model.cpu_seconds(), model.anonymous_mb()
        model.prefill(np.random.default_rng(0).integers(3, 31999, (1, speed.PROMPT)))
        end, end_cpu = time.perf_counter(), model.cpu_seconds()
        found = cls(
            end - wall, end_cpu - cpu, opened - wall, opened_cpu - cpu, memory - before, model.anonymous_mb() - before
        )
        model.close()
        return found


def first_tokens(models: Mapping[str, tuple[str, str]], openings: int, threads: int) -> str:
    """A table of the time from opening to the first token of a prompt of `PROMPT` tokens, in new processes in turn.

    Args:
        models: Name of a row -> class of speed.py, and path.
        openings: Of each model, after one that reads its files.
        threads: Of the models.
    """
    found: dict[str, list[Start]] = {name: [] for name in models}
    for turn in range(openings + 1):
        for name, (kind, path) in models.items():
            start = Start.of(kind, path, threads)
            if turn:
                found[name].append(start)
    lines = [
        "| model | first token, s | CPU s | ratio of CPU s | opening, s | CPU s | anonymous MB | after the prompt |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(found.values()))
    for name, rows in found.items():

        def median(field: str, rows: list[Start] = rows) -> float:
            return statistics.median(getattr(row, field) for row in rows)

        lines.append(
            f"| {name} | {median('wall'):.2f} | {median('cpu'):.2f} | {median('cpu') / median('cpu', first):.2f} "
            f"| {median('opening'):.2f} | {median('opening_cpu'):.2f} | {median('open_mb'):.0f} | {median('mb'):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
