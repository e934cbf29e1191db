"""`tensorrt.json`: the settings that an engine is built with, and facts about the engine.

`builder.py`, which may run where moec is not installed, reads the file as plain JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moec.compiler.common.errors import ArtifactError

FILE = "tensorrt.json"
ADDED_INPUTS = "moec.added_inputs"
"""Metadata key in model.onnx: `input_defaults` and `token_inputs` of this file, since its inputs have no defaults."""


class Bounds(BaseModel):
    """Minimum, optimal and maximum shape of an input in an optimisation profile."""

    model_config = ConfigDict(frozen=True)

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Profile(BaseModel):
    """An optimisation profile: its name and the shapes of all inputs with dynamic shapes."""

    model_config = ConfigDict(frozen=True)

    name: str
    inputs: dict[str, Bounds]


class EngineFacts(BaseModel):
    """Facts about an engine, the same on every rebuild.

    Attributes:
        inputs: Name -> TensorRT's name of the dtype, and the shape with -1 for dynamic axes.
        outputs: The same for the outputs.
        network_layers: Layer type -> number of layers in the parsed network.
        engine_layers: Layer type -> number of layers in the engine.
        constants: dtype -> number of constant values in the engine, as far as the library's log lists them.
        weight_bytes: Bytes of the weights in the engine.
        engine_bytes: Bytes of the engine's file.
    """

    model_config = ConfigDict(frozen=True)

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    network_layers: dict[str, int]
    engine_layers: dict[str, int]
    constants: dict[str, int]
    weight_bytes: int
    engine_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The facts as in `tensorrt.json` and moec.json."""
        return self.model_dump(mode="json")


class EngineSettings(BaseModel):
    """Contents of the file, in the order of its keys.

    Attributes:
        schema_version: Version of the file's schema.
        onnx: File name of the model that the engine is built from.
        library: Module that builds the engine.
        library_version: Version of that module; empty if no engine was built.
        engine: File name of the engine; None if none was built.
        compute_capabilities: GPUs that the engine is for, such as "8.6".
        experts: How experts are computed; see `moec.targets.tensorrt.forms.Form`.
        batch: Maximum number of sequences at once.
        context: Tokens that the KV cache holds.
        piece: Maximum number of tokens of one prefill step.
        workspace_mib: Maximum scratch memory on the GPU in MiB; 0: TensorRT decides.
        weight_streaming: Whether weights may stay in host memory.
        input_defaults: Input that a pass added -> its default values, flattened.
        token_inputs: Input with one row per token that a pass added -> width of a row.
        profiles: The optimisation profiles.
        trtexec: The command that builds the same engine with classic TensorRT.
        built: Facts about the engine; None if none was built.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    onnx: str
    library: str
    library_version: str
    engine: str | None
    compute_capabilities: tuple[str, ...]
    experts: str
    batch: int
    context: int
    piece: int
    workspace_mib: int
    weight_streaming: bool
    input_defaults: dict[str, list[float]]
    token_inputs: dict[str, int] = {}
    profiles: tuple[Profile, ...]
    trtexec: str
    built: EngineFacts | None = None

    def write(self, directory: Path) -> None:
        """Write the file into `directory`."""
        content = self.model_dump(mode="json", exclude={"built"})
        if self.built is not None:
            content["built"] = self.built.to_json()
        (directory / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> EngineSettings:
        """Read the file in `directory`.

        Raises:
            ArtifactError: The file is missing or damaged, or has another schema version.
        """
        path = directory / FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error}", hint="export the model again") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"{path}: {where}: {first['msg']}", hint="export the model again") from error
