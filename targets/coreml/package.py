"""Writes an `.mlpackage` whose bytes depend only on the model.

coremltools' own writer uses random identifiers and an unspecified order of maps.
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
"""Prefix of the names of all operations of experts, and of no others, by which their cost is counted."""


def write_package(program: Any, package: Path, specification_version: int, describe: Any) -> Any:
    """Serialise a MIL program.

    Args:
        program: The MIL program.
        package: Directory to make.
        specification_version: Version of the model format; 9 is that of iOS 18.
        describe: Adds descriptions and metadata; called with the `Model` message and, by function, old -> new names
            of its values.

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
