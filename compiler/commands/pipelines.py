"""`moec build` and `moec diff`: the commands of a build pipeline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moec.compiler.commands.options import OutputConsole, resolved

_WIDTH = 20


def build(
    console: OutputConsole,
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.YAML", help="Models, targets, quantization, routing.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the artifacts and of the summary.")],
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Builds at a time; 0: one per two cores.")] = 0,
    executor: Annotated[str, typer.Option(metavar="process|ray", help="Where cells are built.")] = "process",
    cache: Annotated[Path | None, typer.Option(help="Directory of the cache. (default: ~/.cache/moec/builds)")] = None,
    no_gates: Annotated[bool, typer.Option("--no-gates", help="Run no gates and use no cache.")] = False,
) -> int:
    """Build every cell of a matrix, with results of earlier builds from the cache; failures do not stop the others."""
    with console.progress() as progress:
        from moec.compiler.build import batch
        from moec.compiler.build.cache import default_directory
        from moec.compiler.build.matrix import read_matrix

        cells = read_matrix(matrix)
        outcomes = batch.build_matrix(
            cells,
            output,
            cache=cache or default_directory(),
            jobs=jobs,
            executor=executor,
            gates=not no_gates,
            progress=progress,
        )
    code = batch.exit_code(outcomes)

    def show() -> None:
        rows = [
            (found.name, found.status, f"{found.seconds:.1f} s", f"{found.bytes / 1e6:.1f} MB", found.summary)
            for found in outcomes
        ]
        console.rows(rows, header=("cell", "", "time", "size", ""))
        counts = {status: sum(found.status == status for found in outcomes) for status in ("built", "cached", "failed")}
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        console.line(f"{output}: {said}; {batch.PAGE} has the details")

    console.result({"exit_code": code, "cells": [asdict(found) for found in outcomes]}, show, code)
    return code


def diff(
    console: OutputConsole,
    first: Annotated[Path, typer.Argument(metavar="A", help="An artifact.", callback=resolved)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.", callback=resolved)],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Return 1 if anything differs.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
) -> int:
    """Say whether B is better or worse than A, and what differs: recipe, graph, sizes, routing, gates and more."""
    from moec.compiler.report import judgement
    from moec.compiler.report.diff import diff as compare

    found = compare(first, second)
    judged = judgement.judge(found)

    def show() -> None:
        if markdown:
            console.line(judgement.markdown(found, judged))
            return
        console.line(judged.sentence)
        if found:
            console.line("")
            console.rows(judgement.rows(found, _WIDTH), header=("section", "", "A", "B", "change"))

    said = {"comparison": str(judged.comparison), "sentence": judged.sentence}
    code = int(exit_code and bool(found))
    console.result({**said, "differences": [item.as_dict() for item in found]}, show, code)
    return code
