"""The page of a matrix of builds: a row for each cell with its outcome, its size, and what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

from markupsafe import Markup

from moec.compiler.common.verdict import Status
from moec.compiler.report import plots
from moec.compiler.report.describe import size_text
from moec.compiler.report.page import Cell, Part, Section, Table, page
from moec.compiler.report.schema import HTML, Report

TEMPLATE = "matrix.html.jinja"
_HEADER = ("Cell", "Outcome", "Gates", "Model files", "Of checkpoint", "Perplexity", "Tokens per second", "Build time")
_STYLES = {"built": "pass", "cached": "pass", "failed": "fail"}
_MARKS = {"pass": "✓", "fail": "✗"}


@dataclass(frozen=True)
class Build:
    """One cell of a matrix.

    Attributes:
        name: Name of the cell, and of its directory below that of the page.
        status: "built", "cached" or "failed".
        why: Why it failed; ignored otherwise.
        seconds: Wall-clock time of the build.
        report: Its report; None if there is no artifact.
    """

    name: str
    status: str
    why: str
    seconds: float
    report: Report | None


def to_html(builds: Sequence[Build]) -> str:
    """The page, which links to the report of each cell; it needs no network and no script."""
    counts = Counter(build.status for build in builds)
    sections = [
        Section("cells", "Cells", [Part(_table(builds))] if builds else [], "the matrix has no cell"),
        Section(
            "trade-off",
            "Size against quality",
            _trade_off(builds),
            "it needs two cells with a perplexity (quality: {max_loss: 1%} in the matrix)",
        ),
    ]
    if failed := [build for build in builds if build.status == "failed"]:
        rows = [(_first(build), Cell(build.why)) for build in failed]
        sections.insert(1, Section("failures", "Failures", [Part(Table("Why a cell failed.", ("Cell", "Why"), rows))]))
    return page(
        TEMPLATE,
        sections,
        counts=", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "no cell",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _table(builds: Sequence[Build]) -> Table:
    rows = []
    for build in builds:
        summary = build.report.summary if build.report else {}
        style = _STYLES.get(build.status, "")
        ratio, increase = summary.get("ratio"), summary.get("perplexity_increase")
        speeds = summary.get("tokens_per_second", {}).items()
        rows.append(
            (
                _first(build),
                Cell(f"{_MARKS.get(style, '')} {build.status}", style=f"status {style}"),
                Cell(_gates(build.report) if build.report else ""),
                Cell(size_text(summary["bytes"]) if summary else "", number=True),
                Cell("" if ratio is None else f"{ratio:.2f}", number=True),
                Cell("" if increase is None else f"{increase:+.2%}", number=True),
                Cell(", ".join(f"{rate:.0f} ({workload})" for workload, rate in speeds), number=True),
                Cell(f"{build.seconds:.1f} s", number=True),
            )
        )
    caption = "One row per cell, with a link to its report. What was not measured is left empty."
    return Table(caption, _HEADER, rows)


def _first(build: Build) -> Cell:
    return Cell(build.name, link=f"{quote(build.name)}/{HTML}" if build.report else "")


def _gates(report: Report) -> str:
    """How many gates have which status, such as "5 pass, 2 not run"."""
    counts = Counter(str(verdict.status) for verdict in report.verdicts)
    return ", ".join(f"{counts[status]} {status}" for status in Status if counts[status])


def _trade_off(builds: Sequence[Build]) -> list[Part]:
    """Size and change of perplexity of the cells that have both."""
    made = {build.name: build.report.summary for build in builds if build.report and build.report.summary}
    measured = {name: found for name, found in made.items() if found.get("perplexity_increase") is not None}
    if len(measured) < 2:
        return []
    points = {name: (found["bytes"] / 1e6, found["perplexity_increase"] * 100) for name, found in measured.items()}
    dots = [plots.Dot(size, loss, f"{name}: {size:.2f} MB, {loss:+.2f} %") for name, (size, loss) in points.items()]
    labels = plots.Labels(
        "trade-off-plot",
        "Change of perplexity by size of the model files",
        f"{'; '.join(dot.text for dot in dots)}.",
    )
    plot = plots.scatter(labels, dots, ("model files, MB", "perplexity, %"))
    rows = [
        (Cell(name), Cell(f"{size:.2f} MB", number=True), Cell(f"{loss:+.2f} %", number=True))
        for name, (size, loss) in sorted(points.items(), key=lambda item: item[1])
    ]
    caption = "Size of the model files and change of perplexity against each cell's own source model."
    return [Part(Table(caption, ("Cell", "Model files", "Perplexity"), rows), Markup(plot))]
