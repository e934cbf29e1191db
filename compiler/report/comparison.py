"""A comparison of artifacts as a table, for the terminal and as Markdown."""

from __future__ import annotations

from pathlib import Path

from moec.compiler.common.markdown import table
from moec.compiler.measure.compare import Compared
from moec.compiler.measure.latency.statistics import Interval


def rows(found: Compared) -> list[tuple[str, ...]]:
    """The figures as rows: name of a figure, and its value for every artifact."""
    verdicts = (None, *found.verdicts)
    listed: list[tuple[str, list[str]]] = [
        ("perplexity", [f"{item.perplexity:.4f}" for item in found.figures]),
        ("change of perplexity", ["" if one is None else _range(one.increase, "{:+.2%}") for one in verdicts]),
        ("KL, nats per token", ["" if one is None else f"{one.divergence:.2e}" for one in verdicts]),
        ("same next token", ["" if one is None else f"{one.agreement:.1%}" for one in verdicts]),
    ]
    for workload in found.figures[0].seconds:
        listed.append((workload, [f"{item.seconds[workload].value * 1e3:.3g} ms" for item in found.figures]))
        relative = ["" if one is None else _range(one.times[workload], "{:.3f}") for one in verdicts]
        listed.append((f"{workload}, time relative to A", relative))
    if not found.not_measured:
        listed.append(("load", [f"{(item.load or 0) * 1e3:.0f} ms" for item in found.figures]))
        listed.append(("peak memory", [f"{(item.memory or 0) / 1e6:.1f} MB" for item in found.figures]))
    listed.append(("files", [f"{item.size / 1e6:.2f} MB" for item in found.figures]))
    return [(name, *cells) for name, cells in listed]


def _range(interval: Interval, form: str) -> str:
    value, low, high = map(form.format, (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def markdown(found: Compared) -> str:
    """The comparison as Markdown: a sentence for each artifact, and the table of figures."""
    header = ("", *(f"{item.name}: {Path(item.directory).name}" for item in found.figures))
    lines = [*(f"**{verdict.sentence}**" for verdict in found.verdicts), table(header, rows(found))]
    if found.not_measured:
        lines.append(f"Latency was not measured: {found.not_measured}.")
    return "\n\n".join(lines)
