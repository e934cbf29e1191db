"""report.html: a self-contained page (no network, no script) of sections with tables and plots.

Every plot is next to a table of its figures. A section without data says why, and how to measure it.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from moec.compiler.common.sizes import size_text
from moec.compiler.report import plots
from moec.compiler.report.describe import describe_built, describe_file
from moec.compiler.report.plots import Labels
from moec.compiler.report.summary import next_rows, summary_rows

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: Its text.
        number: Whether it is aligned as a number.
        heat: Intensity of its colour in 0..1; None: no colour.
        alarm: Whether it has a red frame.
        link: Address that the first cell of a row leads to; empty: none.
        style: Class of its style, such as "status pass"; empty: none.
    """

    text: str
    number: bool = False
    heat: float | None = None
    alarm: bool = False
    link: str = ""
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is the row's header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    dense: bool = False

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """The header, and for each column whether it holds numbers."""
        numbers = [any(cell.number for cell in column) for column in zip(*self.rows, strict=False)]
        return [
            (text, number) for text, number in zip(self.header, numbers or [False] * len(self.header), strict=False)
        ]


@dataclass(frozen=True)
class Part:
    """A plot and the table of its figures; either may be missing."""

    table: Table | None = None
    plot: Markup | None = None
    open: bool = True


@dataclass(frozen=True)
class Section:
    """A section of the page; without parts it shows `missing`, the reason."""

    key: str
    title: str
    parts: Sequence[Part]
    missing: str = ""


def to_html(report: Mapping[str, Any]) -> str:
    """The page of a report (the content of report.json)."""
    return page(
        TEMPLATE,
        sections(report),
        report=report,
        name=", ".join(report["model"].get("architectures", ())) or "artifact",
        summary=summary_rows(report["summary"]) if report["summary"] else [],
        commands=next_rows(report["summary"]) if report["summary"] else [],
    )


def page(template: str, content: Sequence[Section], **values: Any) -> str:
    """A page of sections: `template` says what is above and below them, with `values`."""
    return _environment().get_template(template).render(sections=content, **values)


@cache
def _environment() -> jinja2.Environment:
    """One for all pages, as it keeps the compiled templates."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size_text, "seconds": _seconds}
    return environment


def _template(name: str) -> str:
    folder = importlib.resources.files("moec").joinpath("compiler", "report", "templates")
    return folder.joinpath(name).read_text(encoding="utf-8")


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The sections after the verdicts, in order."""
    figures = {verdict["gate"]: verdict["figures"] for verdict in report["verdicts"]}
    accounting = report["routing"].get("accounting", {}).get("layers", [])
    return [
        Section("built", "What was built", _built(report), "moec.json has no facts about the model"),
        *([_foreign(report["foreign"])] if report.get("foreign") else []),
        Section("parity", "Parity by case", _cases(report["verdicts"]), "the parity gates did not run"),
        Section("latency", "Latency", _latency(figures.get("latency", {})), "give --latency-budget to measure it"),
        _sizes(report),
        Section("coverage", "Experts that text used", _coverage(figures.get("coverage", {})), "coverage did not run"),
        Section(
            "utilisation",
            "Use of the experts with dynamic routing",
            [heat_map("Tokens of the calibration text that use each expert.", accounting)] if accounting else [],
            "the artifact has no dynamic routing (--routing)",
        ),
        Section(
            "slots",
            "Experts per token, layer by layer",
            _experts_per_token(accounting),
            "the artifact has no dynamic routing (--routing)",
        ),
        Section(
            "paging",
            "If memory holds only a part of the experts",
            _paging(report["routing"].get("accounting", {}).get("paging", [])),
            "the artifact has no dynamic routing (--routing)",
        ),
        Section("errors", "Error of the weights by layer", _errors(report), "no weight is quantized (--quantize)"),
        Section("trade-off", "Size against quality", _trade_off(report), "formats were not chosen by --quantize auto"),
        Section("timings", "Time by stage", _timings(report["timings"]), "no stage was timed"),
    ]


def _foreign(found: Mapping[str, Any]) -> Section:
    """What a model file of another exporter holds."""
    about = Table("The file.", ("", ""), [(_text(name), _text(text)) for name, text in describe_file(found)[:-1]])
    rows = [
        (_text(row["class"]), _text(row["precision"]), _number(str(row["tensors"])), _number(size_text(row["bytes"])))
        for row in found["tensors"]
    ]
    held = Table("Its tensors; classes are found by shape.", ("Class", "Precision", "Tensors", "Size"), rows)
    counts = [(_text(kind), _number(str(count))) for kind, count in found["operators"].items()]
    operators = Table("Operators of its graph.", ("Operator", "Number"), counts)
    return Section("file", "The file", [Part(table) for table in (about, held, operators) if table.rows])


def _cases(verdicts: Iterable[Mapping[str, Any]]) -> list[Part]:
    rows = [
        (
            _text(case["name"]),
            _text(verdict["gate"]),
            _number(_error(case["error"])),
            _number(_error(verdict["figures"]["limit"])),
            _number(str(case["positions"])),
            _number(str(case["excused"])),
            _number(f"{case['top1']:.1%}"),
        )
        for verdict in verdicts
        for case in verdict["figures"].get("cases", ())
    ]
    header = ("Case", "Gate", "Error", "Limit", "Positions", "Excused by ties", "Same best token")
    caption = "Largest difference of a position's logits, relative to the largest logit of the case."
    return [Part(Table(caption, header, rows))] if rows else []


_SAMPLES = 20
"""Fewest calls whose quantiles are plotted."""


def _latency(figures: Mapping[str, Any]) -> list[Part]:
    """Distribution of every workload: `samples` is workload -> artifact -> `wall`, the seconds of each turn's calls."""
    parts = []
    for number, (workload, by_artifact) in enumerate(figures.get("samples", {}).items()):
        for artifact, series in by_artifact.items():
            calls = sorted(seconds * 1e3 for turn in series["wall"] for seconds in turn)
            if len(calls) < _SAMPLES:
                continue
            points = [(share, calls[min(len(calls) - 1, math.ceil(share * len(calls)) - 1)]) for share in _QUANTILES]
            shown = ", ".join(f"{_quantile(share)} {value:.3g} ms" for share, value in points)
            name = f"{workload}, {artifact}"
            labels = Labels(
                f"latency-{number}-{artifact}", f"Latency of {name}", f"Histogram of {len(calls)} calls: {shown}."
            )
            rows = [(_text(_quantile(share)), _number(f"{value:.3f} ms")) for share, value in points]
            table = Table(f"{name}: quantiles of {len(calls)} calls.", ("Quantile", "Wall-clock time"), rows)
            parts.append(Part(table, Markup(plots.histogram(labels, calls, "milliseconds"))))
    estimates = [
        (
            _text(workload),
            _number(f"{each['estimated'] * 1e3:.3g} ms"),
            _number(f"{each['measured'] * 1e3:.3g} ms"),
            _number(f"{each['error']:+.0%}"),
        )
        for workload, each in figures.get("estimate", {}).items()
    ]
    if estimates:
        header = ("Step", "Estimated", "Measured", "Error")
        parts.append(Part(Table("What moec estimate predicts, and the median measured.", header, estimates)))
    return parts


def _quantile(share: float) -> str:
    return "slowest" if share == 1 else f"p{share * 100:g}"


_QUANTILES = (0.5, 0.9, 0.99, 1.0)


def _sizes(report: Mapping[str, Any]) -> Section:
    classes, files = report["tensor_bytes"], report["files"]
    parts = []
    if classes:
        ordered = dict(sorted(classes.items(), key=lambda item: -item[1]))
        labels = Labels(
            "sizes-plot",
            "Bytes by tensor class",
            f"{_largest(ordered)} takes the most, {size_text(max(ordered.values()))}.",
        )
        names = [name.replace("_", " ") for name in ordered]
        plot = plots.bars(labels, names, [value / 1e6 for value in ordered.values()], "MB")
        parts.append(Part(_shares("Weights by tensor class.", "Class", ordered), Markup(plot)))
    if files:
        parts.append(Part(_shares("Files of the artifact.", "File", files)))
    return Section("sizes", "Size by tensor class and by file", parts, "the target states no sizes")


def _shares(caption: str, of: str, values: Mapping[str, int]) -> Table:
    total = sum(values.values()) or 1
    rows = [(_text(name), _number(size_text(value)), _number(f"{value / total:.1%}")) for name, value in values.items()]
    rows.append((_text("all"), _number(size_text(sum(values.values()))), _number("100.0%")))
    return Table(caption, (of, "Size", "Share"), rows)


def _coverage(figures: Mapping[str, Any]) -> list[Part]:
    return [
        heat_map(
            f"{step}: number of compared tokens that used each expert, by layer; {seen['share']:.1%} of the experts "
            "were used. A framed 0 marks an unused expert.",
            seen["layers"],
        )
        for step, seen in figures.get("steps", {}).items()
    ]


def heat_map(caption: str, layers: Sequence[Mapping[str, Any]]) -> Part:
    """A table of layers by experts, coloured by the number of tokens on a logarithmic scale.

    Args:
        caption: Its caption.
        layers: `tokens` of every expert, and optionally `layer`, the header of the row in place of its position.
    """
    largest = max((tokens for layer in layers for tokens in layer["tokens"]), default=0)
    scale = math.log1p(largest) or 1.0
    width = max((len(layer["tokens"]) for layer in layers), default=0)
    rows = [
        (
            _text(str(layer.get("layer", position))),
            *(Cell(str(count), True, math.log1p(count) / scale, not count) for count in layer["tokens"]),
        )
        for position, layer in enumerate(layers)
    ]
    return Part(Table(caption, ("Layer", *map(str, range(width))), rows, dense=True))


def _paging(rows: Sequence[Mapping[str, Any]]) -> list[Part]:
    caption = "Memory and reads as shares of all expert weights; memory holds the experts that were used last."
    header = ("Memory", "Experts found in it", "A token reads from disk")
    cells = [[_number(f"{row[key]:.1%}") for key in ("memory_share", "hit_rate", "read_share")] for row in rows]
    return [Part(Table(caption, header, cells))] if rows else []


def _experts_per_token(layers: Sequence[Mapping[str, Any]]) -> list[Part]:
    if not layers:
        return []
    names = [str(position) for position in range(len(layers))]
    means = [layer["kept_share"] * layer["top_k"] for layer in layers]
    labels = Labels(
        "slots-plot",
        "Mean experts per token and layer",
        f"From {min(means):.2f} to {max(means):.2f} experts; the pretrained model uses {layers[0]['top_k']}.",
    )
    most = max(len(layer["kept_by_k"]) for layer in layers)
    rows = [
        (
            _text(name),
            _number(f"{mean:.2f}"),
            _number(str(layer["top_k"])),
            _number(f"{layer['kept_share']:.1%}"),
            *(_number(f"{share:.1%}") for share in layer["kept_by_k"]),
            *(_number("") for _ in range(most - len(layer["kept_by_k"]))),
        )
        for name, mean, layer in zip(names, means, layers, strict=True)
    ]
    header = ("Layer", "Mean k", "Pretrained k", "Slots kept", *(f"k = {number}" for number in range(most)))
    table = Table("Mean number of experts, and share of the tokens that use k of them.", header, rows)
    plot = plots.bars(labels, names, means, "experts per token")
    return [Part(table, Markup(plot))]


def _errors(report: Mapping[str, Any]) -> list[Part]:
    layers: Mapping[str, float] = report["quantization"].get("layers", {})
    if not layers:
        return []
    worst = max(layers, key=lambda name: layers[name])
    labels = Labels(
        "errors-plot",
        "Relative error of rounded weights by layer",
        f"{worst} has the largest, {layers[worst]:.3g}.",
    )
    rows = [(_text(name), _number(f"{error:.4f}")) for name, error in layers.items()]
    short = [name.removeprefix("layer ") for name in layers]
    plot = plots.bars(labels, short, list(layers.values()), "relative error")
    caption = "Root of squared error over squared norm, of the weights or, where GPTQ rounded, of their outputs."
    return [Part(Table(caption, ("Layer", "Relative error"), rows), Markup(plot))]


def _trade_off(report: Mapping[str, Any]) -> list[Part]:
    found = report["quantization"].get("auto", {})
    points = found.get("trade_off", [])
    if not points:
        return []
    chosen = found["chosen"]
    places = [(point["bytes"] / 1e6, point["predicted_increase"] * 100) for point in points]
    mark = (chosen["bytes"] / 1e6, chosen["predicted_increase"] * 100)
    labels = Labels(
        "trade-off-plot",
        "Predicted increase of perplexity by size of the weights",
        f"{len(points)} points; the chosen one takes {mark[0]:.2f} MB for {mark[1]:+.2f} %.",
    )
    plot = plots.line(labels, places, ("weights, MB", "perplexity, %"), mark)
    listed = sorted([(point, "") for point in points] + [(chosen, "chosen")], key=lambda item: item[0]["bytes"])
    rows = [
        (
            _text(size_text(point["bytes"])),
            _number(f"{point['share_of_fp16']:.3f}"),
            _number(f"{point['predicted_increase']:+.3%}"),
            _text(note),
        )
        for point, note in listed
    ]
    caption = "Predicted increase of perplexity by size, from the sensitivities; the ring marks the built artifact."
    return [Part(Table(caption, ("Weights", "Of fp16", "Perplexity", "Choice"), rows), Markup(plot))]


def _built(report: Mapping[str, Any]) -> list[Part]:
    rows = [(_text(name), _text(value)) for name, value in describe_built(report)]
    return (
        [Part(Table("The artifact, with the source model in brackets if it differs.", ("", ""), rows))] if rows else []
    )


def _timings(timings: Mapping[str, float]) -> list[Part]:
    rows = [(_text(name), _number(_seconds(value))) for name, value in timings.items()]
    return [Part(Table("Wall-clock time of every stage.", ("Stage", "Time"), rows))] if rows else []


def _largest(values: Mapping[str, float]) -> str:
    return max(values, key=lambda name: values[name])


def _text(text: str) -> Cell:
    return Cell(text)


def _number(text: str) -> Cell:
    return Cell(text, number=True)


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _error(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}"
