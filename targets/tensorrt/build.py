"""Runs the builder in a separate process, with a memory limit, progress and a log."""

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
"""Events of the builder while it works. It is a file, since writing to a pipe could block the builder's threads."""
SAMPLE_SECONDS = 0.02

BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 700_000_000, 3.5
"""Predicted peak memory of the builder: a constant, and a factor for the bytes of the weights.

This is an upper bound of what benchmarks/tensorrt_build.py measures.
"""


@dataclass(frozen=True)
class Failure:
    """An error of the parser or the builder.

    Attributes:
        stage: "parse" or "build".
        message: Message of the library.
        node: Name of the node that caused it; empty if the library names none.
        operator: Operator of this node.
    """

    stage: str
    message: str
    node: str
    operator: str


@dataclass
class Built:
    """Result of a build.

    Attributes:
        found: Facts about the engine; None if there is none.
        seconds: Time of the build.
        peak_bytes: Peak anonymous memory of the process.
        failure: The error of the parser or the builder; None if there was none.
    """

    found: EngineFacts | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    failure: Failure | None = None


def predicted_bytes(weight_bytes: int) -> int:
    """Upper bound of the memory for building an engine with `weight_bytes` of weights."""
    return BASE_BYTES + int(BYTES_PER_WEIGHT_BYTE * weight_bytes)


def memory_limit(wanted_gb: float | None) -> int:
    """Bytes that the builder may use: `wanted_gb`, or the free memory if it is None."""
    return psutil.virtual_memory().available if wanted_gb is None else int(wanted_gb * 1e9)


def check_memory(weight_bytes: int, limit: int) -> None:
    """Refuse a build that will not fit into memory, before it starts.

    Raises:
        LoweringError: The build is predicted to need more than `limit` bytes.
    """
    needed = predicted_bytes(weight_bytes)
    if needed > limit:
        raise LoweringError(
            f"building the engine needs up to {needed / 1e9:.1f} GB of memory, but {limit / 1e9:.1f} GB may be used",
            hint="quantize, raise --memory-limit, or build on another machine: --no-engine writes model.onnx and the "
            "script that builds it",
        )


def run(folder: Path, library: str, output: str, *, limit: int, cache: Path | None = None, progress: Progress) -> Built:
    """Build the engine in `folder`, which holds the script, the settings and the model.

    Args:
        folder: The artifact.
        library: Module of the library.
        output: File name of the engine.
        limit: Bytes of anonymous memory; the process is ended when it uses more.
        cache: Timing cache, or None.
        progress: Called with what the builder does.

    Raises:
        LoweringError: The builder used too much memory or crashed. Errors of parser and builder are in the result.
    """
    built = Built()
    command = [sys.executable, "-P", SCRIPT, "--library", library, "--output", output, "--events", EVENTS]
    command += ("--timing-cache", str(cache.resolve())) if cache is not None else ()
    with (folder / LOG).open("w") as log, (folder / EVENTS).open("w+") as events:
        child = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            exceeded = _follow(child, events, lambda event: _handle_event(event, log, built, progress), limit, built)
        finally:
            child.kill()  # does nothing if it has ended
            child.wait()
            (folder / EVENTS).unlink()
        log.write(f"peak memory {built.peak_bytes} bytes, {built.seconds:.2f} s\n")
    if exceeded:
        raise LoweringError(
            f"the builder was ended: it used more than {limit / 1e9:.1f} GB of memory",
            hint="raise --memory-limit, quantize, or build on another machine from model.onnx",
        )
    if child.returncode and built.failure is None:
        died = f"the builder ended with code {child.returncode}: {_last_lines(folder / LOG)}"
        raise LoweringError(died, hint="see build.log")
    return built


def _follow(
    child: subprocess.Popen[bytes],
    events: IO[str],
    handle: Callable[[Mapping[str, Any]], None],
    limit: int,
    built: Built,
) -> bool:
    """Follow events and memory of the child until it ends; whether it was ended for using more than `limit`."""
    exceeded, rest = False, ""
    while True:
        ended = child.poll() is not None
        *lines, rest = (rest + events.read()).split("\n")
        for line in lines:
            handle(json.loads(line))
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


def _handle_event(event: Mapping[str, Any], log: IO[str], built: Built, progress: Progress) -> None:
    """Handle one event of the builder."""
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
