"""Finds and parses the model inside an `.mlpackage` directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.library import coremltools_module


def model_file(package: Path) -> Path:
    """Path of the package's root model.

    Raises:
        ArtifactError: Not a package, or a damaged one.
    """
    manifest = package / "Manifest.json"
    hint = "give the path of an .mlpackage directory"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        item = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{manifest} cannot be read: {error}", hint=hint) from error
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{manifest} names no root model: {error!r}", hint=hint) from error
    path = package / "Data" / str(item)
    if ".." in Path(str(item)).parts or not path.is_file():
        raise ArtifactError(f"{manifest} names the model {item}, which is not in the package", hint=hint)
    return path


def load_spec(path: Path) -> Any:
    """Parse a `Model` message that holds an ML program.

    Args:
        path: The `.mlmodel` file.

    Raises:
        ArtifactError: Not a `Model` message, or not an ML program.
        MissingExtraError: coremltools is not installed.
    """
    proto = coremltools_module("coremltools.proto.Model_pb2")
    decode_error = coremltools_module("google.protobuf.message").DecodeError
    model = proto.Model()
    try:
        model.ParseFromString(path.read_bytes())
    except decode_error as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint="export the model again") from error
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise ArtifactError(
            f"{path} holds a model of type {kind}, not an ML program",
            hint="convert with minimum_deployment_target iOS 15 or later",
        )
    return model
