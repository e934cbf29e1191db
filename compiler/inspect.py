"""What a checkpoint or an artifact holds, as one JSON-able mapping."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.artifact import MANIFEST, is_artifact, read_manifest
from moec.compiler.errors import UnsupportedModelError
from moec.compiler.model_config import read_json, remarks


def inspect(location: str, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Describe an artifact, or a checkpoint (directory or hub id) and whether it can be captured.

    No weight is read. A model that cannot be captured is described too: `captured` is False and `reason` says why.

    Raises:
        ArtifactError: The artifact's moec.json is damaged.
        CheckpointError: Not a checkpoint, or a damaged one.
    """
    directory = Path(location).expanduser()
    if is_artifact(directory):
        return _artifact(directory)
    return _checkpoint(location, revision, trust_remote_code)


def _artifact(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    report = read_json(directory / "report.json")
    kept = ("recipe", "model", "routing", "quantization", "signature", "passes", "rejections", "facts", "tools")
    return {
        "kind": "artifact",
        "location": str(directory),
        **{name: manifest[name] for name in kept if name in manifest},
        "verdicts": report.get("verdicts", []),
        **_sizes({name: directory / name for name in (MANIFEST, *manifest["files"])}),
    }


def _checkpoint(location: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    from moec.compiler.frontend.capture import capture
    from moec.compiler.frontend.checkpoint import Checkpoint
    from moec.compiler.summary import model_summary

    checkpoint = Checkpoint.open(location, revision=revision, trust_remote_code=trust_remote_code)
    entries = checkpoint.entries.values()
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries)
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "location": str(checkpoint.directory),
        "tensors": len(entries),
        "stored_parameters": sum(math.prod(entry.shape) for entry in entries),
        "dtypes": dict(dtypes.most_common()),
    }
    try:
        summary: Mapping[str, Any] = model_summary(capture(checkpoint))
        found |= {"captured": True, "model": summary}
    except UnsupportedModelError as error:
        found |= {"captured": False, "reason": error.message, "model": _configured(checkpoint.raw_config)}
    files = (*checkpoint.companions(), *checkpoint.files)
    return found | _sizes({path.name: path for path in files})


def _configured(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": config.get("model_type", ""), "architectures": list(config.get("architectures") or [])}


def _sizes(files: Mapping[str, Path]) -> dict[str, Any]:
    sizes = {name: path.stat().st_size for name, path in sorted(files.items()) if path.is_file()}
    return {"bytes": sum(sizes.values()), "files": sizes}


def describe(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same for people: rows of what and how much."""
    model: Mapping[str, Any] = found.get("model", {})
    rows = [(found["kind"], found["location"]), ("model", " ".join([model["model_type"], *model["architectures"]]))]
    if "recipe" in found:
        recipe = found["recipe"]
        options = ", ".join(f"{key} {_plain(value)}" for key, value in recipe["options"].items())
        rows.append(("target", f"{recipe['target']} {recipe['dtype']}" + (f" ({options})" if options else "")))
    if "captured" in found:
        rows.append(("can be captured", "yes" if found["captured"] else f"no: {found['reason']}"))
    if "dtypes" in found:
        kinds = ", ".join(f"{count} {name}" for name, count in found["dtypes"].items())
        rows.append(("tensors", f"{found['tensors']}: {kinds}; {_count(found['stored_parameters'])} parameters"))
    if "parameters" in model:
        rows.extend(_model_rows(model))
    rows.extend(
        (f"gate {verdict['gate']}", f"{verdict['status']}: {verdict['summary']}")
        for verdict in found.get("verdicts", [])
    )
    rows.append(("files", f"{len(found['files'])}, {_size(found['bytes'])}"))
    rows.extend((f"  {name}", _size(size)) for name, size in found["files"].items())
    return rows


def _model_rows(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    parameters, states = model["parameters"], model["states"]
    shapes = Counter(
        (layer["num_experts"], layer["top_k"], layer["intermediate_size"]) for layer in model["moe_layers"]
    )
    experts = "; ".join(
        f"{count} layers of {number}, top-{top_k}, width {width}" for (number, top_k, width), count in shapes.items()
    )
    share = parameters["active"] / max(parameters["total"], 1)
    context = model["max_position_embeddings"]
    growth = f"{_size(states['bytes_per_token'])} per token"
    if states.get("bytes_fixed"):
        growth += f", {_size(states['bytes_fixed'])} per sequence"
    rows = [
        ("layers", f"{model['layers']}, of which {len(model['moe_layers'])} with experts"),
        ("experts", experts),
        ("parameters", f"{_count(parameters['total'])}, active per token {_count(parameters['active'])} ({share:.0%})"),
        ("states", f"{states['count']} ({', '.join(states['kinds'])}), {growth}"),
        (
            "context",
            f"{context} tokens, vocabulary {model['vocab_size']}" if context else f"vocabulary {model['vocab_size']}",
        ),
    ]
    return [*rows, *remarks(model)]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(number: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"
