"""The report of an artifact: report.json for programs, report.html for people, report.xml (JUnit) for CI systems.

`schema.py` defines report.json, and `page.py` makes report.html.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from moec.compiler.common.errors import OutputError
from moec.compiler.common.files import in_json_types
from moec.compiler.common.machine import machine
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.gates.run import exit_code
from moec.compiler.report.page import to_html
from moec.compiler.report.schema import HTML, JSON, JUNIT, SCHEMA_VERSION, Report, VerdictRecord
from moec.compiler.report.summary import summarise


def write(
    directory: Path,
    manifest: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    timings: Mapping[str, float],
    files: Mapping[str, int] | None = None,
) -> None:
    """Write the three forms of the report into an artifact.

    Args:
        directory: The artifact, or another directory for the report.
        manifest: Its moec.json.
        verdicts: One per gate.
        timings: Stage -> seconds.
        files: File -> bytes, if they are not those of `directory`.

    Raises:
        OutputError: The directory cannot be written.
    """
    report = make_report(directory, manifest, verdicts, timings, files)
    try:
        (directory / JSON).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (directory / HTML).write_text(to_html(report), encoding="utf-8")
        (directory / JUNIT).write_bytes(to_junit({"moec gates": verdicts}))
    except OSError as error:
        raise OutputError(
            f"{directory}: the report cannot be written: {error}", hint="check free space and permissions"
        ) from error


def make_report(
    directory: Path,
    manifest: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    timings: Mapping[str, float],
    files: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The content of report.json; arguments as for `write`."""
    files = file_sizes(directory) if files is None else files
    judged = [asdict(verdict) for verdict in verdicts]
    report = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "exit_code": exit_code(verdicts),
        "summary": summarise(manifest, files, judged),
        "verdicts": judged,
        "timings": dict(timings),
        "machine": machine(),
        "versions": dict(sorted(manifest.get("tools", {}).items())),
        "model": manifest.get("model", {}),
        "recipe": manifest.get("recipe", {}),
        "routing": manifest.get("routing", {}),
        "quantization": manifest.get("quantization", {}),
        "foreign": manifest.get("foreign", {}),
        "rejections": list(_rejections(manifest)),
        "files": files,
        "tensor_bytes": manifest.get("facts", {}).get("tensor_bytes") or manifest.get("tensor_bytes", {}),
    }
    return Report.model_validate(in_json_types(report)).model_dump(mode="json")


def _rejections(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for record in manifest.get("passes", ()):
        yield from record.get("rejections", ())
    yield from manifest.get("rejections", ())


def file_sizes(directory: Path) -> dict[str, int]:
    """Path in the artifact -> bytes, for every file but the reports."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    return {name: path.stat().st_size for name, path in names.items() if name not in (JSON, HTML, JUNIT)}


def to_junit(suites: Mapping[str, Sequence[VerdictRecord | Verdict]], failed: Mapping[str, str] | None = None) -> bytes:
    """Verdicts as JUnit XML: one test case per gate; a gate that did not run is skipped, never passed.

    Args:
        suites: Name of a test suite -> its verdicts.
        failed: Name of a test suite without verdicts -> why there are none; it has one test case with an error.
    """
    root = ElementTree.Element("testsuites")
    for name, verdicts in suites.items():
        cases = [_case(verdict) for verdict in verdicts]
        ElementTree.SubElement(root, "testsuite", {"name": name, **_counts(cases)}).extend(cases)
    for name, reason in (failed or {}).items():
        case = ElementTree.Element("testcase", {"classname": "moec.build", "name": "build", "time": "0.000"})
        ElementTree.SubElement(case, "error", {"message": reason})
        ElementTree.SubElement(root, "testsuite", {"name": name, **_counts([case])}).append(case)
    root.attrib.update(_counts(list(root.iter("testcase"))))
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content


def _case(verdict: VerdictRecord | Verdict) -> ElementTree.Element:
    seconds = float(verdict.figures.get("seconds", 0.0))
    case = ElementTree.Element("testcase", {"classname": "moec.gates", "name": verdict.gate, "time": f"{seconds:.3f}"})
    if verdict.status.failed:
        ElementTree.SubElement(case, "failure", {"message": verdict.summary})
    elif verdict.status is Status.NOT_RUN:
        ElementTree.SubElement(case, "skipped", {"message": verdict.summary})
    else:
        ElementTree.SubElement(case, "system-out").text = verdict.summary
    return case


def _counts(cases: Sequence[ElementTree.Element]) -> dict[str, str]:
    """The attributes of a test suite: how many of its cases failed, were skipped or had an error, and their seconds."""
    found = {plural: sum(case.find(tag) is not None for case in cases) for plural, tag in _OUTCOMES.items()}
    seconds = sum(float(case.get("time", 0)) for case in cases)
    return {"tests": str(len(cases)), **{name: str(count) for name, count in found.items()}, "time": f"{seconds:.3f}"}


_OUTCOMES = {"failures": "failure", "skipped": "skipped", "errors": "error"}
