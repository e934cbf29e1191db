"""`moec build`: build every cell of a matrix or take it from the cache, and write a summary in three forms."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.build.cache import Cache
from moec.compiler.build.executors import EXECUTORS
from moec.compiler.build.matrix import Cell
from moec.compiler.build.worker import Outcome, Task, size
from moec.compiler.common.artifact import is_artifact
from moec.compiler.common.errors import ArtifactError, CheckpointError, UsageError
from moec.compiler.common.files import write_output
from moec.compiler.common.threads import available_cores
from moec.compiler.common.validation import unknown
from moec.compiler.pipeline.recipe import make_recipe
from moec.compiler.report.matrix_page import Build, to_html
from moec.compiler.report.schema import read_report
from moec.compiler.report.write import to_junit

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress

SUMMARY, PAGE, JUNIT = "summary.json", "summary.html", "summary.xml"
HINT = "choose another directory with -o"
FAILED = 1
"""Exit code if cells failed with different exit codes."""


def build_matrix(
    cells: Sequence[Cell],
    output: Path,
    *,
    cache: Path,
    jobs: int = 0,
    executor: str = "process",
    gates: bool = True,
    progress: Progress = lambda *_: None,
) -> tuple[Outcome, ...]:
    """Build all cells into `output`/NAME and write a summary there: summary.json after each cell, the rest at the end.

    Args:
        cells: The cells to build.
        output: Directory of the artifacts.
        cache: Directory of the cache; cells in it are not built again.
        jobs: Number of parallel builds; 0: one per two cores.
        executor: A name in `EXECUTORS`.
        gates: Whether to run the gates. Artifacts without gates are not cached.
        progress: Called with the number of finished cells.

    Returns:
        One outcome per cell, in the order of `cells`.

    Raises:
        UsageError: There is no such executor.
        OutputError: `output` or the cache cannot be written.
    """
    if executor not in EXECUTORS:
        raise unknown(executor, EXECUTORS, "unknown executor", "the executors")
    output, store = output.expanduser().resolve(), Cache(cache)
    done: dict[str, Outcome] = {}
    tasks = []
    progress("cells", 0, len(cells))
    for cell in cells:
        key = _key(cell, store) if gates else ""
        found = _from_cache(cell, key, store, output) if key else None
        if found is None:
            tasks.append(Task(cell.name, cell.fields, str(output / cell.name), str(store.directory), key, gates))
        else:
            done[cell.name] = found
    _write(output, cells, done)
    progress("cells", len(done), len(cells))
    if tasks:
        jobs = min(jobs or max(1, available_cores() // 2), len(tasks))
        for outcome in EXECUTORS[executor](tasks, jobs):
            done[outcome.name] = outcome
            _write(output, cells, done)
            progress("cells", len(done), len(cells))
    outcomes = tuple(done[cell.name] for cell in cells)
    _report(output, outcomes)
    return outcomes


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if no cell failed, the exit code of the failed cells if it is the same for all, else 1."""
    codes = {outcome.exit_code for outcome in outcomes if outcome.status == "failed"}
    if not codes:
        return 0
    return codes.pop() if len(codes) == 1 else FAILED


def _key(cell: Cell, cache: Cache) -> str:
    """Cache key of a cell, or empty if its recipe is wrong or its checkpoint missing, which the build will report."""
    try:
        return cache.key(make_recipe(cell.fields, where=cell.name))
    except (UsageError, CheckpointError, ArtifactError):
        return ""


def _from_cache(cell: Cell, key: str, cache: Cache, output: Path) -> Outcome | None:
    """The outcome of a cell that is in the cache, or None."""
    started = time.perf_counter()
    if not cache.restore(key, output / cell.name):
        return None
    report = read_report(output / cell.name)
    verdicts = {verdict.gate: str(verdict.status) for verdict in report.verdicts}
    summary = "; ".join(f"{verdict.gate}: {verdict.summary}" for verdict in report.verdicts[:2])
    seconds = time.perf_counter() - started
    return Outcome(cell.name, "cached", 0, summary, seconds, size(output / cell.name), verdicts)


def _report(output: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the summary for people, as a page that links to the cells' reports, and for CI systems, as JUnit.

    Raises:
        OutputError: `output` cannot be written.
    """
    builds = []
    for found in outcomes:
        directory = output / found.name
        report = read_report(directory) if is_artifact(directory) else None
        builds.append(Build(found.name, found.status, found.summary, found.seconds, report))
    suites = {build.name: build.report.verdicts for build in builds if build.report}
    failed = {build.name: build.why for build in builds if build.report is None}
    write_output(output / PAGE, to_html(builds), hint=HINT)
    write_output(output / JUNIT, to_junit(suites, failed).decode(), hint=HINT)


def _write(output: Path, cells: Sequence[Cell], done: dict[str, Outcome]) -> None:
    """Write the summary of the finished cells atomically."""
    outcomes = [asdict(done[cell.name]) for cell in cells if cell.name in done]
    content = {
        "schema_version": 1,
        "cells": outcomes,
        "missing": [cell.name for cell in cells if cell.name not in done],
        "exit_code": exit_code(list(done.values())),
    }
    write_output(output / SUMMARY, json.dumps(content, indent=2, ensure_ascii=False) + "\n", hint=HINT)
