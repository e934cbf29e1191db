"""Writes an `.mlpackage` whose bytes depend on nothing but the model.

coremltools' own writer draws identifiers at random and leaves the order of maps open.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.targets.coreml.deduplicate import compact
from moec.targets.coreml.library import coremltools_module

PACKAGE = "model.mlpackage"
FOLDER = "com.apple.CoreML"
MODEL, WEIGHTS = f"{FOLDER}/model.mlmodel", f"{FOLDER}/weights"

EXPERT_SCOPE = "moe"
"""What the names of the operations of experts start with, and no others: what they cost is counted by it."""


def write_package(program: Any, package: Path, specification_version: int, describe: Any) -> Any:
    """Serialise a MIL program.

    Args:
        program: The MIL program.
        package: Directory to make.
        specification_version: Of the model format; that of iOS 18 is 9.
        describe: Called with the `Model` message, and by function what its values are called now, to add descriptions
            and metadata.

    Returns:
        The `Model` message.
    """
    data = package / "Data"
    (data / WEIGHTS).mkdir(parents=True)
    load = coremltools_module("coremltools.converters.mil.backend.mil.load").load
    spec = load(program, weights_dir=str(data / WEIGHTS), specification_version=specification_version)
    describe(spec, compact(spec))
    (data / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    (package / "Manifest.json").write_text(json.dumps(_manifest(), indent=4, sort_keys=True) + "\n", encoding="utf-8")
    return spec


def _manifest() -> Mapping[str, Any]:
    model, weights = (str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper() for path in (MODEL, WEIGHTS))
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            model: _entry(MODEL, "model.mlmodel", "CoreML Model Specification"),
            weights: _entry(WEIGHTS, "weights", "CoreML Model Weights"),
        },
        "rootModelIdentifier": model,
    }


def _entry(path: str, name: str, description: str) -> Mapping[str, str]:
    return {"author": FOLDER, "description": description, "name": name, "path": path}
