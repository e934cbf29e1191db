"""What was made, in one mapping: the same in the terminal, `moec inspect`, report.html and an artifact's README.md.

README.md of an artifact holds nothing that was measured, so it is the same on every rebuild.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moec.compiler.common.errors import MoecError
from moec.compiler.common.markdown import table
from moec.compiler.report.describe import Row, executed_text, remarks, size_text
from moec.targets import get_target
from moec.targets.base import Target
from moec.targets.next_steps import VALIDATE, NextStep

README = "README.md"
_UNMEASURED = "not measured"
_QUALITY, _LATENCY, _CANDIDATE = "quality", "latency", "candidate"


def summarise(
    manifest: Mapping[str, Any],
    sizes: Mapping[str, int],
    verdicts: Iterable[Mapping[str, Any]] = (),
    *,
    directory: str = ".",
    checkpoint: str = "CHECKPOINT",
) -> dict[str, Any]:
    """What an artifact was made from, what it is, and how to go on.

    Args:
        manifest: The content of moec.json; every section is optional.
        sizes: File of the artifact -> bytes, with the model files at least.
        verdicts: The gates' verdicts as in report.json, for what was measured.
        directory: The artifact, as the next commands name it.
        checkpoint: The checkpoint, as the next commands name it.

    Returns:
        A mapping for JSON. `perplexity_increase` is relative to the source model, and `tokens_per_second` maps a
        workload such as "decode128" (a step after 128 tokens) to the median; None and {} if they were not measured.
        `ratio` is `bytes` over `source_bytes`; None if the latter is not known.
    """
    model, recipe, routing = (manifest.get(name, {}) for name in ("model", "recipe", "routing"))
    size = sum(sizes.get(name, 0) for name in manifest.get("model_files", ()))
    source_size = manifest.get("source", {}).get("bytes")
    figures = {verdict["gate"]: verdict.get("figures", {}) for verdict in verdicts}
    experts, increase = _experts(model), figures.get(_QUALITY, {}).get("increase")
    place = manifest.get("foreign", {}).get("path", directory)
    names = {"directory": shlex.quote(place), "checkpoint": shlex.quote(checkpoint)}
    return {
        "source": ", ".join(model.get("architectures", ())) or model.get("model_type", ""),
        "target": recipe.get("target", ""),
        "dtype": recipe.get("dtype", ""),
        "formats": _formats(manifest),
        "routing": "; ".join(filter(None, (routing.get("policy"), executed_text(routing)))),
        "experts": {"left": experts, "source": _experts(model.get("source", {})) or experts},
        "bytes": size,
        "source_bytes": source_size,
        "ratio": size / source_size if source_size else None,
        "perplexity_increase": None if increase is None else float(increase),
        "tokens_per_second": _speeds(figures.get(_LATENCY, {})),
        "next": [
            {"command": step.command.format(**names), "does": step.does}
            for step in ((VALIDATE,) if manifest.get("foreign") else _next_steps(recipe.get("target", "")))
        ],
    }


def summary_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Name and text of each row but the next commands; what was not measured says so."""
    increase, speeds = summary["perplexity_increase"], summary["tokens_per_second"]
    perplexity = _UNMEASURED if increase is None else f"{increase:+.2%} against the source model"
    speed = ", ".join(f"{rate:.{0 if rate >= 100 else 1}f} ({workload})" for workload, rate in speeds.items())
    return [*built_rows(summary), ("perplexity", perplexity), ("tokens per second", speed or _UNMEASURED)]


def built_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The rows of `summary_rows` that are the same on every rebuild."""
    experts, size = summary["experts"], size_text(summary["bytes"])
    if summary["ratio"] is not None:
        size += f", {summary['ratio']:.2f} times the checkpoint's {size_text(summary['source_bytes'])}"
    formats = "; ".join(f"{name}: {', '.join(classes)}" for name, classes in summary["formats"].items())
    return [
        ("made", f"{summary['source'] or 'a model'} -> {summary['target']} {summary['dtype']}".rstrip()),
        ("formats", formats or f"{summary['dtype'] or 'unknown'}, nothing is quantized"),
        ("routing", summary["routing"] or "as the model was trained"),
        ("experts left", f"{experts['left']} of {experts['source']}"),
        ("model files", size),
    ]


def next_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The next commands, and what each of them does."""
    return [(step["command"], step["does"]) for step in summary["next"]]


def command_lines(summary: Mapping[str, Any]) -> list[str]:
    """The next commands for a shell, with what they do as comments."""
    commands = next_rows(summary)
    width = max((len(command) for command, _ in commands), default=0)
    return [f"{command:{width}}  # {does}" for command, does in commands]


def opening(summary: Mapping[str, Any], manifest: Mapping[str, Any], rows: Iterable[Row]) -> list[str]:
    """The first lines of a page in Markdown about an artifact: its title, its compiler and a table.

    Args:
        summary: What `summarise` returns.
        manifest: The content of moec.json.
        rows: The rows of the table, before those of `remarks`.
    """
    return [
        f"# {summary['source'] or 'A model'} for {summary['target'] or 'deployment'}",
        "",
        f"Compiled by moec {manifest.get('tools', {}).get('moec', '')}".rstrip() + ".",
        "",
        table(("", ""), [*rows, *remarks(manifest.get("model", {}))]),
        "",
    ]


def readme(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """README.md of an artifact: the summary without measurements, with commands to be run in its directory.

    Args:
        manifest: The content of moec.json, of which `files` and `digest` are not needed.
        sizes: Model file -> bytes.
    """
    summary = summarise(manifest, sizes)
    lines = [
        *opening(summary, manifest, built_rows(summary)),
        "`report.html` has the verdicts of the gates and everything that was measured; `moec.json` has the recipe, the",
        "digest of every file and the versions of the tools.",
        "",
        "## In this directory",
        "",
        "```",
        *command_lines(summary),
        "```",
        "",
        table(("model file", "size"), [(name, size_text(size)) for name, size in sorted(sizes.items())]),
    ]
    return "\n".join(lines) + "\n"


def _experts(model: Mapping[str, Any]) -> int:
    """Experts of all layers."""
    return sum(layer["num_experts"] for layer in model.get("moe_layers", ()))


def _formats(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Format -> tensor classes that have it, both sorted, and the KV cache; empty if nothing is quantized."""
    held: dict[str, list[str]] = {}
    quantization = manifest.get("quantization", {})
    if cache := quantization.get("kv_cache"):
        held[cache["format"]] = ["KV cache"]
    for name, found in sorted(quantization.get("classes", {}).items()):
        for form in found.get("formats", {}):
            held.setdefault(manifest.get("recipe", {}).get("dtype", form) if form == "none" else form, []).append(name)
    return dict(sorted(held.items()))


def _speeds(figures: Mapping[str, Any]) -> dict[str, float]:
    """Decode workload -> tokens per second of one sequence, from the median time of a step."""
    medians = {
        workload: float(each[_CANDIDATE]["wall"]["p50"]["value"])  # infinity is a text in the file
        for workload, each in figures.get("workloads", {}).items()
        if workload.startswith("decode") and each.get(_CANDIDATE)
    }
    return {workload: 1 / seconds for workload, seconds in medians.items() if seconds}


def _next_steps(target: str) -> Sequence[NextStep]:
    """The next steps of a target, or those of any target if it is not installed here."""
    try:
        return get_target(target).next_steps
    except MoecError:
        return Target.next_steps
