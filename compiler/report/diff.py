"""`moec diff A B`: the differences between the moec.json and report.json of two artifacts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moec.compiler.common.artifact import read_manifest
from moec.compiler.report.schema import Report, read_report

_FIGURES = ("max_error", "increase", "divergence", "top1_agreement", "minimum", "limit")
"""Figures of gates that are compared, where a gate has them."""


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        section: "source", "recipe", "tools", "graph", "sizes", "files", "routing", "quantization" or "gates".
        what: Name of the differing value in the section.
        first: Its value in A; None if A does not have it.
        second: Its value in B; None if B does not have it.
    """

    section: str
    what: str
    first: Any
    second: Any

    @property
    def change(self) -> float | None:
        """(second - first) / first if both are numbers and the first is not zero; else None."""
        numbers = [value for value in (self.first, self.second) if isinstance(value, int | float)]
        if len(numbers) < 2 or not self.first or isinstance(self.first, bool):
            return None
        return float(numbers[1] / numbers[0] - 1)

    def as_dict(self) -> dict[str, Any]:
        """The difference as a mapping for JSON."""
        return {**asdict(self), "change": self.change}


def diff(first: Path, second: Path) -> list[Difference]:
    """Compare two artifacts.

    Raises:
        ArtifactError: A directory is not an artifact, or its moec.json or report.json is damaged.
    """
    before, after = (dict(_facts(read_manifest(place), read_report(place))) for place in (first, second))
    found = []
    sections = list(dict.fromkeys(section for section, _ in (*before, *after)))
    for section, name in sorted({**before, **after}, key=lambda key: sections.index(key[0])):
        left, right = before.get((section, name)), after.get((section, name))
        if left != right:
            found.append(Difference(section, name, left, right))
    return found


def _facts(manifest: Mapping[str, Any], report: Report) -> Iterator[tuple[tuple[str, str], Any]]:
    """Pairs of (section, name) and value for everything that is compared, in display order."""
    facts = manifest.get("facts", {})
    sections: tuple[tuple[str, Any], ...] = (
        ("source", manifest.get("source", {}).get("digests", {})),
        ("recipe", manifest.get("recipe", {})),
        ("tools", manifest.get("tools", {})),
        ("graph", {**facts.get("ops", {}), "opset": facts.get("opset")}),
        ("graph", {f"pass {record['name']} {at}": record.get("modified") for at, record in _passes(manifest)}),
        ("graph", {"signature": manifest.get("signature", {})}),
        ("sizes", {**report.tensor_bytes, "all files": sum(report.files.values())}),
        ("files", manifest.get("files", {})),
        ("routing", _routing(manifest.get("routing", {}))),
        ("quantization", _quantization(manifest.get("quantization", {}))),
        ("gates", dict(_gates(report))),
    )
    for section, values in sections:
        for name, value in _flat(values):
            if value is not None:
                yield (section, name), value


def _passes(manifest: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every pass, numbered, since a pass may run several times."""
    seen: dict[str, int] = {}
    for record in manifest.get("passes", ()):
        seen[record["name"]] = seen.get(record["name"], 0) + 1
        yield seen[record["name"]], record


def _routing(routing: Mapping[str, Any]) -> dict[str, Any]:
    accounting = routing.get("accounting", {})
    kept = {f"layer {number}": row["kept_share"] for number, row in enumerate(accounting.get("layers", ()))}
    return {
        "policy": routing.get("policy"),
        "slots kept": {"all": accounting.get("kept_share"), **kept},
        "executed FLOPs": {
            name: phase.get("executed_flops_share") for name, phase in accounting.get("phases", {}).items()
        },
    }


def _quantization(quantization: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "error of": quantization.get("layers", {}),
        "classes": quantization.get("classes", {}),
        "KV cache": quantization.get("kv_cache", {}).get("format"),
    }


def _gates(report: Report) -> Iterator[tuple[str, Any]]:
    for verdict in report.verdicts:
        yield verdict.gate, str(verdict.status)
        for name in _FIGURES:
            if name in verdict.figures:
                yield f"{verdict.gate}: {name}", verdict.figures[name]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of the leaves of nested mappings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name} {key}".strip())
    else:
        yield name, value
