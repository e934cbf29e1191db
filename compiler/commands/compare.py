"""`moec compare`: artifacts of one model against each other, before one of them is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.compiler.commands.options import OutputConsole, resolved
from moec.compiler.common.errors import UsageError


def compare(
    console: OutputConsole,
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B [C]",
            help="Artifacts, or REGISTRY/NAME@ALIAS; all are compared with A.",
            callback=lambda given: [resolved(path) for path in given],
        ),
    ],
    text: Annotated[Path | None, typer.Option(metavar="PATH", help="Held-out text. (default: moec's own)")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text, spread over it.")] = 64,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Sessions of latency; an interval needs 10.")] = 10,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt whose latency is measured.")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime while latency is measured.")] = 1,
    seconds: Annotated[float, typer.Option(min=1, help="Longest time of the rounds.")] = 300.0,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Measure neither latency nor memory.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Return 1 if one is worse than A in any way.")] = False,
) -> int:
    """Run the same held-out text and the same turns of latency on several artifacts, and give a verdict for each.

    'moec diff' compares what was recorded; this command measures.
    """
    if not 2 <= len(directories) <= 4:
        raise UsageError(
            f"{len(directories)} artifacts are given, and 2 to 4 can be compared", hint="moec compare A B --text FILE"
        )
    with console.progress() as progress:
        from moec.compiler.measure import compare as measured
        from moec.compiler.report import comparison

        options = measured.CompareOptions(
            None if text is None else str(text), windows, window, not no_latency, rounds, context, threads, seconds
        )
        found = measured.compare_artifacts(directories, options, progress)

    def show() -> None:
        if markdown:
            console.line(comparison.markdown(found))
            return
        for verdict in found.verdicts:
            console.line(verdict.sentence)
        console.line("")
        console.rows(comparison.rows(found), header=("", *(item.name for item in found.figures)))
        if found.not_measured:
            console.line(f"latency was not measured: {found.not_measured}")

    worse = {measured.Outcome.WORSE, measured.Outcome.MIXED} & {verdict.outcome for verdict in found.verdicts}
    code = int(exit_code and bool(worse))
    console.result(found.record(), show, code)
    return code
