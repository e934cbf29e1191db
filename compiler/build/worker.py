"""Builds one cell of a matrix in a process of its own, so that its memory use and crashes do not affect other cells.

`python -m moec.compiler.build.worker` reads the cell as one line of JSON and prints the outcome as one line. It exits
when its standard input is closed, so nothing keeps running when the parent process is killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moec.compiler.build.cache import Cache
from moec.compiler.common.artifact import is_artifact
from moec.compiler.common.errors import MoecError, first_line
from moec.compiler.pipeline.recipe import make_recipe

INTERNAL = 70


@dataclass(frozen=True)
class Task:
    """The task of a worker.

    Attributes:
        name: Name of the cell.
        fields: Recipe of the cell.
        output: Directory of the artifact.
        cache: Directory of the cache.
        key: Key in the cache; empty: do not cache.
        gates: Whether to run the gates.
    """

    name: str
    fields: Mapping[str, Any]
    output: str
    cache: str
    key: str = ""
    gates: bool = True


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        name: Name of the cell.
        status: "built", "cached" or "failed".
        exit_code: Exit code that `moec export` would have.
        summary: Why it failed, or the first verdicts in one line.
        seconds: Wall-clock time.
        bytes: Size of the artifact.
        verdicts: Gate -> status.
    """

    name: str
    status: str
    exit_code: int = 0
    summary: str = ""
    seconds: float = 0.0
    bytes: int = 0
    verdicts: Mapping[str, str] = field(default_factory=dict)


def build(task: Task) -> Outcome:
    """Build one cell, and add it to the cache if nothing failed.

    Every error, including a fault of moec, becomes an outcome with the status "failed".
    """
    from moec.compiler.pipeline.export import compile_recipe

    started = time.perf_counter()
    output = Path(task.output)
    try:
        recipe = make_recipe(task.fields, where=task.name)
        result = compile_recipe(recipe, output, overwrite=True, gates=task.gates)
        if result.exit_code == 0 and task.key:
            Cache(Path(task.cache)).store(task.key, output)
    except MoecError as error:
        return failed(task, error.message + (f" ({error.hint})" if error.hint else ""), error.exit_code, started)
    except Exception as error:  # noqa: BLE001 - an unexpected error fails only this cell
        return failed(task, f"internal: {type(error).__name__}: {first_line(error)}", INTERNAL, started)
    said = result.failed or result.verdicts
    return Outcome(
        task.name,
        "failed" if result.exit_code else "built",
        result.exit_code,
        "; ".join(f"{verdict.gate}: {verdict.summary}" for verdict in said[:2]),
        time.perf_counter() - started,
        size(output),
        {verdict.gate: str(verdict.status) for verdict in result.verdicts},
    )


def failed(task: Task, why: str, code: int, started: float) -> Outcome:
    """The outcome of a cell without an artifact; an artifact of an earlier run is removed."""
    output = Path(task.output)
    if is_artifact(output):
        shutil.rmtree(output)
    return Outcome(task.name, "failed", code, why, time.perf_counter() - started)


def size(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main() -> None:
    """Entry point of the process."""
    task = Task(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(json.dumps(asdict(build(task))), flush=True)


def _end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
