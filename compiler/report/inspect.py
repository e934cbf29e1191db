"""The contents of a checkpoint or an artifact as one mapping for JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.common.artifact import MANIFEST, is_artifact, read_manifest
from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.report.schema import JSON, read_report
from moec.compiler.report.summary import summarise


def inspect(location: str, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Describe an artifact or a checkpoint (directory or hub id) without reading a weight.

    A checkpoint is captured. If that is not possible, `captured` is False and `reason` says why.

    Raises:
        ArtifactError: The artifact's moec.json is damaged.
        CheckpointError: The location is not a checkpoint, or the checkpoint is damaged.
    """
    directory = Path(location).expanduser()
    if is_artifact(directory):
        return _artifact(directory)
    return _checkpoint(location, revision, trust_remote_code)


def _artifact(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    verdicts: list[dict[str, Any]] = []
    if (directory / JSON).is_file():
        verdicts = [verdict.model_dump(mode="json") for verdict in read_report(directory).verdicts]
    kept = (
        "recipe",
        "model",
        "routing",
        "quantization",
        "tensor_bytes",
        "signature",
        "passes",
        "rejections",
        "facts",
        "tools",
    )
    sizes = _sizes({name: directory / name for name in (MANIFEST, *manifest["files"])})
    return {
        "kind": "artifact",
        "location": str(directory),
        "summary": summarise(manifest, sizes["files"], verdicts, directory=str(directory)),
        **{name: manifest[name] for name in kept if name in manifest},
        "verdicts": verdicts,
        **sizes,
    }


def _checkpoint(location: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    from moec.compiler.frontend.capture import capture
    from moec.compiler.frontend.checkpoint import Checkpoint
    from moec.compiler.ir.safetensors_file import DTYPES
    from moec.compiler.measure.summary import model_summary

    checkpoint = Checkpoint.open(location, revision=revision, trust_remote_code=trust_remote_code)
    entries = checkpoint.entries.values()
    dtypes = Counter(str(DTYPES.get(entry.kind, entry.kind)).removeprefix("torch.") for entry in entries)
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
    return found | _sizes({path.relative_to(checkpoint.directory).as_posix(): path for path in files})


def _configured(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": config.get("model_type", ""), "architectures": list(config.get("architectures") or [])}


def _sizes(files: Mapping[str, Path]) -> dict[str, Any]:
    sizes = {name: path.stat().st_size for name, path in sorted(files.items()) if path.is_file()}
    return {"bytes": sum(sizes.values()), "files": sizes}
