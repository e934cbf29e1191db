"""What moec's own entry in the metadata of a package says: how the model is called, and where things are in it."""

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
"""Key of the entry in the model's metadata."""


class LayerValues(NamedTuple):
    """Names of the values at which the experts of a layer are entered and left."""

    hidden_states: str
    indices: str
    weights: str
    output: str


class ModelMetadata(BaseModel):
    """The entry.

    Attributes:
        flavor: How the functions are called.
        context: Tokens that the cache holds.
        chunk: Most tokens of one call.
        experts: Tensor of experts -> the name of their constants, `{}` for the index of the expert.
        coded: Tensor that is stored as codes -> the name of its constant.
        layers: Function -> the experts of each layer; empty where an older moec wrote the package.
        inputs: Input that a pass added -> its value where nobody feeds it, flat.
        token_inputs: Input that a pass added and that has a row for each token -> the width of its rows.
    """

    model_config = ConfigDict(frozen=True)

    flavor: Flavor = Flavor.DEFAULT
    context: int
    chunk: int
    experts: dict[str, str]
    coded: dict[str, str] = {}
    layers: dict[str, list[LayerValues]] = {}
    inputs: dict[str, list[float]]
    token_inputs: dict[str, int] = {}

    def to_json(self) -> str:
        """As the metadata holds it."""
        return json.dumps(self.model_dump(), sort_keys=True)


def read_metadata(directory: Path) -> ModelMetadata:
    """The entry of the package in a directory.

    Raises:
        ArtifactError: There is no model, or another tool wrote it, or what it says is damaged.
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
            f"{package}: its metadata is damaged: {where}: {error.errors()[0]['msg']}", hint="export it again"
        ) from error
