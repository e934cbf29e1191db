"""moec's entry in the metadata of a package: how to call the model, and where to find its weights and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor.package import load_spec, model_file
from moec.targets.coreml.flavors import Flavor
from moec.targets.coreml.package import PACKAGE

METADATA_KEY = "moec"
"""Key of moec's entry in the model's metadata."""


class LayerValues(NamedTuple):
    """Names of the inputs and the output of a layer's experts."""

    hidden_states: str
    indices: str
    weights: str
    output: str


class ModelMetadata(BaseModel):
    """Contents of the entry.

    Attributes:
        flavor: Calling convention of the functions.
        context: Tokens that the KV cache holds.
        chunk: Maximum number of tokens per call.
        experts: Stack of experts -> name of their constants, with `{}` for the index of the expert.
        matrices: Weight that is stored as a whole -> name of its constant.
        layers: Function -> the experts of each layer; empty in packages of older versions of moec.
        inputs: Input that a pass added -> its default values, flattened.
        token_inputs: Input with one row per token that a pass added -> width of a row.
    """

    model_config = ConfigDict(frozen=True)

    flavor: Flavor = Flavor.DEFAULT
    context: int
    chunk: int
    experts: dict[str, str]
    matrices: dict[str, str] = {}
    layers: dict[str, list[LayerValues]] = {}
    inputs: dict[str, list[float]]
    token_inputs: dict[str, int] = {}

    def to_json(self) -> str:
        """The entry as JSON."""
        return json.dumps(self.model_dump(), sort_keys=True)


def read_metadata(directory: Path) -> ModelMetadata:
    """Read the entry of the package in `directory`.

    Raises:
        ArtifactError: There is no model, another tool wrote it, or the entry is damaged.
    """
    package = directory / PACKAGE
    text = load_spec(model_file(package)).description.metadata.userDefined.get(METADATA_KEY, "")
    if not text:
        raise ArtifactError(f"{package}: moec did not write this model", hint="give a directory that moec exported")
    try:
        return ModelMetadata.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ArtifactError(
            f"{package}: its metadata is damaged: {where}: {error.errors()[0]['msg']}", hint="export the model again"
        ) from error
