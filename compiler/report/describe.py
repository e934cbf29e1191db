"""A checkpoint or an artifact as rows of a table for people, for `moec inspect` and report.html."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

Row = tuple[str, str]
_LONGEST = 300
"""Longest text of a row in characters, since the parameters of a policy may list hundreds of layers."""


def describe(found: Mapping[str, Any]) -> list[Row]:
    """All rows for a checkpoint or an artifact.

    Args:
        found: The result of `moec.compiler.report.inspect.inspect`.

    Returns:
        Name and text of each row.
    """
    model: Mapping[str, Any] = found.get("model", {})
    rows = [(found["kind"], found["location"]), ("model", _names(model))]
    if "captured" in found:
        rows.append(("can be captured", "yes" if found["captured"] else f"no: {found['reason']}"))
    if "dtypes" in found:
        kinds = ", ".join(f"{count} {name}" for name, count in found["dtypes"].items())
        rows.append(("tensors", f"{found['tensors']}: {kinds}; {_count(found['stored_parameters'])} parameters"))
    rows += describe_built(found)
    rows.extend(
        (f"gate {verdict['gate']}", f"{verdict['status']}: {verdict['summary']}")
        for verdict in found.get("verdicts", [])
    )
    rows.append(("files", f"{len(found['files'])}, {size_text(found['bytes'])}"))
    rows.extend((f"  {name}", size_text(size)) for name, size in found["files"].items())
    return rows


def describe_built(found: Mapping[str, Any]) -> list[Row]:
    """The rows on target, model, routing and weights.

    Args:
        found: The sections `model`, `recipe`, `routing`, `quantization` and `tensor_bytes` of moec.json, all optional.
    """
    rows = []
    if recipe := found.get("recipe"):
        options = ", ".join(f"{key} {_plain(value)}" for key, value in recipe.get("options", {}).items())
        what = f"{recipe.get('target', '')} {recipe.get('dtype', '')}"
        rows.append(("target", what + (f" ({options})" if options else "")))
    if "parameters" in found.get("model", {}):
        rows += _model_rows(found["model"])
    if routing := found.get("routing"):
        rows += _routing_rows(routing)
    if found.get("tensor_bytes"):
        rows.append(("weights", _weights(found)))
    if found.get("quantization", {}).get("kept"):
        rows.append(("codes of the checkpoint", _kept(found["quantization"])))
    return rows


def describe_file(foreign: Mapping[str, Any]) -> list[Row]:
    """The rows on a model file of another exporter (the section `foreign` of report.json)."""
    held = "; ".join(
        f"{row['class']} {row['precision']} ({row['tensors']}, {size_text(row['bytes'])})" for row in foreign["tensors"]
    )
    return [
        ("file", f"{foreign['path']}, {foreign['format']}"),
        ("made by", foreign["producer"]),
        ("run by", foreign["runtime"]),
        ("an unused expert costs", foreign["unused_expert"]),
        ("tensors", held or "not known"),
    ]


def _names(model: Mapping[str, Any]) -> str:
    return " ".join([str(model.get("model_type", "")), *model.get("architectures", ())])


def _model_rows(model: Mapping[str, Any]) -> list[Row]:
    states, source = model["states"], model.get("source", {})
    context = model["max_position_embeddings"]
    growth = f"{size_text(states['bytes_per_token'])} per token"
    if states.get("bytes_fixed"):
        growth += f", {size_text(states['bytes_fixed'])} per sequence"
    kinds = f"{states['count']} ({', '.join(states['kinds'])})"
    if "int8" in states.get("cache_dtypes", ()):
        kinds += ", the KV cache in int8"
    vocabulary = f"vocabulary {model['vocab_size']}"
    return [
        ("layers", f"{model['layers']}, of which {len(model['moe_layers'])} with experts"),
        ("experts", _beside(_experts(model), _experts(source) if source else "")),
        ("parameters", _beside(_parameters(model), _parameters(source) if source else "")),
        ("states", f"{kinds}, {growth}"),
        ("context", f"{context} tokens, {vocabulary}" if context else vocabulary),
        *remarks(model),
    ]


def remarks(model: Mapping[str, Any]) -> list[Row]:
    """The rows on how the checkpoint was read, and which parts of it are not used."""
    rows = [("note", note) for note in model.get("notes", ())]
    if left_out := model.get("left_out"):
        rows.append(("left out", ", ".join(f"{part} ({count} tensors)" for part, count in left_out.items())))
    return rows


def _experts(model: Mapping[str, Any]) -> str:
    shapes = Counter(
        (layer["num_experts"], layer["top_k"], layer["intermediate_size"]) for layer in model["moe_layers"]
    )
    return "; ".join(
        f"{count} layers of {number}, top-{top_k}, width {width}" for (number, top_k, width), count in shapes.items()
    )


def _parameters(model: Mapping[str, Any]) -> str:
    counts = model["parameters"]
    share = counts["active"] / max(counts["total"], 1)
    return f"{_count(counts['total'])}, active per token {_count(counts['active'])} ({share:.0%})"


def _beside(built: str, source: str) -> str:
    """The text on the built model, followed in brackets by that on the source model if it differs."""
    return built if source in ("", built) else f"{built} (the source model: {source})"


def executed_text(routing: Mapping[str, Any]) -> str:
    """The share of the expert FLOPs that dynamic routing executes in each phase; empty if it was not counted."""
    phases = sorted(routing.get("accounting", {}).get("phases", {}).items())
    shares = [
        f"{phase} {found['executed_flops_share']:.1%}" for phase, found in phases if "executed_flops_share" in found
    ]
    return f"expert FLOPs executed: {', '.join(shares)}" if shares else ""


def _routing_rows(routing: Mapping[str, Any]) -> list[Row]:
    rows = []
    if policy := routing.get("policy"):
        text = str(policy)
        if parameters := routing.get("parameters"):
            text += f" ({', '.join(f'{key} {_plain(value)}' for key, value in parameters.items())})"
        if executed := executed_text(routing):
            text += f"; {executed}"
        rows.append(("routing", text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."))
    if removed := routing.get("pruning", {}).get("removed"):
        rows.append(("pruned experts", f"{sum(removed)} in {len(removed)} layers"))
    return rows


def _weights(found: Mapping[str, Any]) -> str:
    """Bytes of every tensor class, with its formats if weights are quantized."""
    classes = found.get("quantization", {}).get("classes", {})
    parts = []
    for name, size in found["tensor_bytes"].items():
        formats = [key for key in classes.get(name, {}).get("formats", {}) if key != "none"]
        parts.append(f"{name} {size_text(size)}" + (f" ({', '.join(formats)})" if formats else ""))
    return f"{size_text(sum(found['tensor_bytes'].values()))}: {', '.join(parts)}"


def _kept(quantization: Mapping[str, Any]) -> str:
    """For every tensor class, what happened to the checkpoint's codes, and the relative error."""
    parts = []
    for name, outcomes in quantization["kept"].items():
        error = quantization.get("classes", {}).get(name, {}).get("relative_error")
        became = " and ".join(f"{text} ({count})" for text, count in outcomes.items())
        parts.append(f"{name}: {became}" + ("" if error is None else f", relative error {error:.2g}"))
    return "; ".join(parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def size_text(number: int) -> str:
    """A number of bytes with a decimal unit, such as "1.50 GB"."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"
