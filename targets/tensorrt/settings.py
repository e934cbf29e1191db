"""`tensorrt.json`: what an engine is built from and for, and what is known of it.

`builder.py`, which runs where there is TensorRT and nothing else, reads the file as plain JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moec.compiler.common.errors import ArtifactError

FILE = "tensorrt.json"
ADDED_INPUTS = "moec.added_inputs"
"""Metadata of model.onnx: `input_defaults` and `token_inputs` of this file. An engine has no inputs with defaults."""


class Bounds(BaseModel):
    """Shapes of an input in an optimisation profile: the smallest, the one to tune for, and the largest."""

    model_config = ConfigDict(frozen=True)

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Profile(BaseModel):
    """An optimisation profile: the shapes of the inputs whose shape is not fixed."""

    model_config = ConfigDict(frozen=True)

    name: str
    inputs: dict[str, Bounds]


class EngineFacts(BaseModel):
    """What is known about an engine, the same on every rebuild.

    Attributes:
        inputs: Name -> TensorRT's name of its type, and its shape, -1 where it is dynamic.
        outputs: The same of the outputs.
        network_layers: Type of a layer of the network that the parser made -> number.
        engine_layers: Type of a layer of the engine -> number.
        constants: Type -> number of values that are constants of the engine, as far as the library names them.
        weight_bytes: Of the weights in the engine.
        engine_bytes: Of the file.
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
        """As `tensorrt.json` and moec.json hold it."""
        return self.model_dump(mode="json")


class EngineSettings(BaseModel):
    """The file, in the order of its keys.

    Attributes:
        schema_version: Of the file.
        onnx: Name of the model that the engine is built from.
        library: Module that builds the engine.
        library_version: Of that module; empty where no engine was built.
        engine: Name of the engine's file; None where none was built.
        compute_capabilities: GPUs that the engine is for, such as "8.6".
        experts: The form of the experts.
        batch: Most sequences at once.
        context: Tokens that the cache holds.
        piece: Most tokens of one prefill step.
        workspace_mib: Most scratch memory on the GPU; 0 leaves it to TensorRT.
        weight_streaming: Whether weights may stay in the memory of the host.
        input_defaults: Input that a pass added -> its value where nobody feeds it, flat.
        token_inputs: Input that a pass added and that has a row for each token -> the width of its rows.
        profiles: The optimisation profiles.
        trtexec: The command that builds the same engine with classic TensorRT.
        built: What is known of the engine, once there is one.
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
        """Write the file."""
        content = self.model_dump(mode="json", exclude={"built"})
        if self.built is not None:
            content["built"] = self.built.to_json()
        (directory / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> EngineSettings:
        """Read the file.

        Raises:
            ArtifactError: It is missing or damaged, or of another version.
        """
        path = directory / FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error}", hint="export it again") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"{path}: {where}: {first['msg']}", hint="export it again") from error
