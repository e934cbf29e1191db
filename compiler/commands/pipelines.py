"""`moec build`, `moec diff` and `moec publish`: the commands of a build pipeline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moec.compiler.commands.options import ArtifactDirectory, OutputConsole

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
    first: Annotated[Path, typer.Argument(metavar="A", help="An artifact.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
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


def publish(
    console: OutputConsole,
    directory: ArtifactDirectory,
    to: Annotated[str, typer.Option(metavar="dir|mlflow|hub", help="Kind of the registry.")],
    name: Annotated[str, typer.Option(help="Name of the model in the registry; OWNER/NAME for the Hub.")],
    registry: Annotated[
        str | None,
        typer.Option(metavar="PATH|URI", help="The directory, MLflow's tracking URI, or another Hub than the usual."),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option("--as", help="Version: of dir (default: the next number), or a tag of the Hub (default: none)."),
    ] = None,
    allow_failed: Annotated[bool, typer.Option("--allow-failed", help="Publish even if a gate failed.")] = False,
    public: Annotated[bool, typer.Option("--public", help="hub: make a new repository public.")] = False,
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="hub: the model that was compiled, for the model card.")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="hub: the license, for the model card.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and show the model card only.")] = False,
) -> int:
    """Put an artifact into a registry, with its version, digests and verdicts."""
    from moec.compiler.build.model_card import CardMetadata
    from moec.compiler.build.publish import publish as put
    from moec.compiler.report.describe import size_text

    found = put(
        directory,
        to,
        registry,
        name,
        version=version,
        allow_failed=allow_failed,
        public=public,
        card=CardMetadata(base_model, license_id) if base_model or license_id else None,
        dry_run=dry_run,
    )

    def show() -> None:
        if not dry_run:
            console.line(f"{found['name']} {found['version']}: {found['location']}")
            return
        console.rows([(place, size_text(size)) for place, size in found["files"].items()], header=("file", "size"))
        if "card" in found:
            console.line("")
            console.line(found["card"])

    console.result(found, show)
    return 0
