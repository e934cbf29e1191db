"""Runs the builder in a process of its own: with a limit on its memory, progress and a log."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from moec.compiler.common.errors import LoweringError
from moec.compiler.common.progress import Progress
from moec.targets.tensorrt.settings import EngineFacts

LOG = "build.log"
SCRIPT = "build_engine.py"
EVENTS = "build.events"
"""What the builder tells while it works: a file, since a thread that writes into a pipe may wait for its reader."""
SAMPLE_SECONDS = 0.02

BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 700_000_000, 3.5
"""Peak memory of the builder: what it needs for a small model, and how it grows with the bytes of the weights.

An upper bound of what benchmarks/tensorrt_build.py measures.
"""


@dataclass(frozen=True)
class Failure:
    """Where the parser or the builder refused.

    Attributes:
        stage: "parse" or "build".
        message: Of the library.
        node: Name of the node, empty where the library names none.
        operator: Its operator.
    """

    stage: str
    message: str
    node: str
    operator: str


@dataclass
class Built:
    """What a build told.

    Attributes:
        found: What is known about the engine; None where there is none.
        seconds: Time of the build.
        peak_bytes: Most anonymous memory of the process.
        failure: Where the parser or the builder refused.
    """

    found: EngineFacts | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    failure: Failure | None = None


def predicted_bytes(weight_bytes: int) -> int:
    """Memory that building an engine with so many bytes of weights takes at most."""
    return BASE_BYTES + int(BYTES_PER_WEIGHT_BYTE * weight_bytes)


def memory_limit(wanted_gb: float | None) -> int:
    """Bytes that the builder may take: what is wanted, or what is free."""
    return psutil.virtual_memory().available if wanted_gb is None else int(wanted_gb * 1e9)


def check_memory(weight_bytes: int, limit: int) -> None:
    """Refuse before the build starts what will not fit.

    Raises:
        LoweringError: The build is predicted to take more than `limit` bytes.
    """
    needed = predicted_bytes(weight_bytes)
    if needed > limit:
        raise LoweringError(
            f"building the engine takes up to {needed / 1e9:.1f} GB of memory, and {limit / 1e9:.1f} GB may be used",
            hint="quantize, raise --memory-limit, or build on another machine: --no-engine writes model.onnx and the "
            "script that builds it",
        )


def run(folder: Path, library: str, output: str, *, limit: int, cache: Path | None = None, progress: Progress) -> Built:
    """Build the engine of `folder`, which holds the script, the settings and the model.

    Args:
        folder: The artifact.
        library: Module of the library.
        output: Name of the engine to write.
        limit: Bytes of anonymous memory; the process is ended when it takes more.
        cache: Timing cache, or None.
        progress: Told what the builder does.

    Raises:
        LoweringError: It took too much memory or died. What parser and builder refuse is in the result.
    """
    built = Built()
    command = [sys.executable, "-P", SCRIPT, "--library", library, "--output", output, "--events", EVENTS]
    command += ("--timing-cache", str(cache.resolve())) if cache is not None else ()
    with (folder / LOG).open("w") as log, (folder / EVENTS).open("w+") as events:
        child = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            exceeded = _follow(child, events, lambda event: _hear(event, log, built, progress), limit, built)
        finally:
            child.kill()  # does nothing where it has ended
            child.wait()
            (folder / EVENTS).unlink()
        log.write(f"peak memory {built.peak_bytes} bytes, {built.seconds:.2f} s\n")
    if exceeded:
        raise LoweringError(
            f"the builder was ended: it took more than the {limit / 1e9:.1f} GB of memory that it may use",
            hint="raise --memory-limit, quantize, or build on another machine from model.onnx",
        )
    if child.returncode and built.failure is None:
        died = f"the builder died with code {child.returncode}: {_last_lines(folder / LOG)}"
        raise LoweringError(died, hint="see build.log")
    return built


def _follow(
    child: subprocess.Popen[bytes], events: IO[str], hear: Callable[[Mapping[str, Any]], None], limit: int, built: Built
) -> bool:
    """Read the events of the child until it ends, and its memory: whether it was ended for taking more than `limit`."""
    exceeded, rest = False, ""
    while True:
        ended = child.poll() is not None
        *lines, rest = (rest + events.read()).split("\n")
        for line in lines:
            hear(json.loads(line))
        if ended:
            return exceeded
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = psutil.Process(child.pid).memory_info()
            used = memory.rss - getattr(memory, "shared", 0)
            built.peak_bytes = max(built.peak_bytes, used)
            if used > limit:
                exceeded = True
                child.kill()
        time.sleep(SAMPLE_SECONDS)


def _hear(event: Mapping[str, Any], log: IO[str], built: Built, progress: Progress) -> None:
    """Take one event in."""
    match event["kind"]:
        case "progress":
            progress("engine", event["done"], event["total"])
        case "log":
            log.write(f"[{event['severity']}] {event['message']}\n")
        case "failed":
            built.failure = Failure(event["stage"], event["message"], event["node"], event["operator"])
        case _:
            built.found = EngineFacts.model_validate(event["found"])
            built.seconds = event["seconds"]


def _last_lines(path: Path) -> str:
    return " | ".join(path.read_text(errors="replace").splitlines()[-3:])
