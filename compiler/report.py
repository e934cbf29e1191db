"""The report of an artifact: report.json for machines, report.html for people, report.xml (JUnit) for CI systems.

report.json, schema version 1:

    schema_version  1; raised when a key changes its meaning or goes
    created         when the gates ran, UTC, ISO 8601
    exit_code       exit code of the command: 0 unless a gate failed
    verdicts        one per gate: gate, status ("pass", "fail", "not run"), summary, exit_code, figures
    timings         stage -> seconds of wall-clock time, in order
    machine         cpu, cores, logical_cores, memory_bytes, os, python
    versions        tool -> version, from moec.json
    model           what was compiled, from moec.json
    recipe          how, from moec.json
    rejections      where a pass or the target left something alone: source, where, reason
    files           file of the artifact -> bytes
    tensor_bytes    tensor class -> bytes, empty where the target does not state them

The figures of a gate belong to that gate; those of "coverage" hold the tokens that reached each expert of each layer,
those of "parity: ..." every case with its error. A figure that is no finite number is a string ("inf", "nan").
"""

from __future__ import annotations

import importlib.resources
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import psutil

from moec.compiler.errors import OutputError
from moec.compiler.gates.coverage import GATE as COVERAGE_GATE
from moec.compiler.gates.run import exit_code
from moec.compiler.gates.verdict import Status, Verdict

SCHEMA_VERSION = 1
JSON, HTML, JUNIT = "report.json", "report.html", "report.xml"
TEMPLATE = "report.html.jinja"


def write(
    directory: Path, manifest: Mapping[str, Any], verdicts: Sequence[Verdict], timings: Mapping[str, float]
) -> None:
    """Write the three forms of the report into an artifact.

    Args:
        directory: The artifact.
        manifest: Its moec.json.
        verdicts: One per gate.
        timings: Stage -> seconds.

    Raises:
        OutputError: The directory cannot be written.
    """
    report = make_report(directory, manifest, verdicts, timings)
    try:
        (directory / JSON).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (directory / HTML).write_text(to_html(report), encoding="utf-8")
        (directory / JUNIT).write_bytes(to_junit(verdicts))
    except OSError as error:
        raise OutputError(f"{directory}: the report cannot be written: {error}", hint="free space there") from error


def make_report(
    directory: Path, manifest: Mapping[str, Any], verdicts: Sequence[Verdict], timings: Mapping[str, float]
) -> dict[str, Any]:
    """The content of report.json; see the module's docstring."""
    report = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "exit_code": exit_code(verdicts),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "timings": dict(timings),
        "machine": machine(),
        "versions": dict(sorted(manifest.get("tools", {}).items())),
        "model": manifest.get("model", {}),
        "recipe": manifest.get("recipe", {}),
        "rejections": list(_rejections(manifest)),
        "files": _files(directory),
        "tensor_bytes": dict(sorted(manifest.get("facts", {}).get("tensor_bytes", {}).items())),
    }
    plain: dict[str, Any] = _plain(report)
    return plain


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 0,
        "logical_cores": psutil.cpu_count() or 0,
        "memory_bytes": int(psutil.virtual_memory().total),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rejections(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for record in manifest.get("passes", ()):
        yield from record.get("rejections", ())
    yield from manifest.get("rejections", ())


def _files(directory: Path) -> dict[str, int]:
    """Size of every file in the artifact but the reports; those in a folder (an .mlpackage) by their path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    return {name: path.stat().st_size for name, path in names.items() if name not in (JSON, HTML, JUNIT)}


def _plain(value: Any) -> Any:
    """`value` in the types of JSON, with what is no finite number as a string."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def to_junit(verdicts: Sequence[Verdict]) -> bytes:
    """The verdicts as JUnit XML: one test case per gate; one that did not run is skipped, never passed."""
    failures = sum(verdict.status is Status.FAIL for verdict in verdicts)
    skipped = sum(verdict.status is Status.NOT_RUN for verdict in verdicts)
    seconds = [float(verdict.figures.get("seconds", 0.0)) for verdict in verdicts]
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(failures),
        "skipped": str(skipped),
        "errors": "0",
        "time": f"{sum(seconds):.3f}",
    }
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "moec gates", **counts})
    for verdict, duration in zip(verdicts, seconds, strict=True):
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "moec.gates", "name": verdict.gate, "time": f"{duration:.3f}"}
        )
        if verdict.status is Status.FAIL:
            ElementTree.SubElement(case, "failure", {"message": verdict.summary})
        elif verdict.status is Status.NOT_RUN:
            ElementTree.SubElement(case, "skipped", {"message": verdict.summary})
        else:
            ElementTree.SubElement(case, "system-out").text = verdict.summary
    ElementTree.indent(suites)
    content: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return content


def to_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs nothing else: no network, no script."""
    template = importlib.resources.files("moec").joinpath("compiler", "templates", TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": _size, "seconds": _seconds, "error": _error}
    page: str = environment.from_string(template).render(
        report=report,
        name=", ".join(report["model"].get("architectures", ())) or "artifact",
        coverage=_coverage(report),
        cases=_cases(report),
        sizes=_bars(report["tensor_bytes"] or report["files"]),
        timings=_bars(report["timings"]),
    )
    return page


def _bars(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Name, value and share of the largest value."""
    largest = max(values.values(), default=0)
    return [
        {"name": name, "value": value, "share": value / largest if largest else 0} for name, value in values.items()
    ]


def _cases(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every case of the parity gates with its gate and limit."""
    return [
        {**case, "gate": verdict["gate"], "limit": verdict["figures"]["limit"]}
        for verdict in report["verdicts"]
        for case in verdict["figures"].get("cases", ())
    ]


def _coverage(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Heat maps of the coverage gate: step -> layers -> experts with tokens and heat in 0..1 on a log scale."""
    by_gate: Mapping[str, Any] = {verdict["gate"]: verdict["figures"] for verdict in report["verdicts"]}
    figures = by_gate.get(COVERAGE_GATE, {})
    maps = []
    for step, seen in figures.get("steps", {}).items():
        largest = max((tokens for layer in seen["layers"] for tokens in layer["tokens"]), default=0)
        scale = math.log1p(largest) or 1.0
        rows = [
            {**layer, "cells": [{"tokens": count, "heat": math.log1p(count) / scale} for count in layer["tokens"]]}
            for layer in seen["layers"]
        ]
        width = max((len(layer["tokens"]) for layer in seen["layers"]), default=0)
        maps.append({"step": step, "share": seen["share"], "layers": rows, "experts": range(width)})
    return maps


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _error(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}"
