"""`tensorrt.json`: what an engine is built from and for, and what is known of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.common.errors import ArtifactError

FILE = "tensorrt.json"
SCHEMA_VERSION = 1
ADDED_INPUTS = "moec.added_inputs"
"""Metadata of model.onnx: `input_defaults` and `token_inputs` of this file. An engine has no inputs with defaults."""


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Write the file."""
    (directory / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(directory: Path) -> dict[str, Any]:
    """Read the file.

    Raises:
        ArtifactError: It is missing or damaged, or of another version.
    """
    path = directory / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}", hint="export it again") from error
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(f"{path}: not of schema version {SCHEMA_VERSION}", hint="export it again")
    return found
