"""Reads weights back from a `.tflite` file. Imports no torch."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.targets.stored_weights import Codes, StoredWeight, stack
from moec.targets.tflite.library import schema

METADATA = "moec"
"""Name of moec's entry in the model's metadata."""

LEGACY_RUNTIME = "tflite-runtime"
"""Runtime in the metadata of files that were built for tflite-runtime; files for LiteRT name none."""

_BITS = {"INT8": 8, "INT4": 4}
_DTYPES = {"FLOAT32": "<f4", "FLOAT16": "<f2", "INT32": "<i4"}


class TfliteFile:
    """A `.tflite` file whose tensors can be read by name.

    Args:
        path: The file.

    Raises:
        ArtifactError: The file is not a `.tflite` file, is damaged, or was not written by moec.
    """

    def __init__(self, path: Path) -> None:
        self._schema, self._path = schema(), path
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size > 8 else b""
        if self._data[4:8] != b"TFL3":
            raise ArtifactError(f"{path}: not a .tflite file", hint="export the model again")
        try:
            self.model = self._schema.Model.GetRootAs(self._data, 0)
            self.facts: Mapping[str, Any] = json.loads(self._metadata())
            self._tensors = self._named()
        except (struct.error, IndexError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path}: damaged: {error}", hint="export the model again") from error

    def _metadata(self) -> bytes:
        for index in range(self.model.MetadataLength()):
            entry = self.model.Metadata(index)
            if entry.Name().decode() == METADATA:
                return bytes(self.buffer(entry.Buffer()))
        raise ArtifactError(f"{self._path}: no moec metadata in this file", hint="export the model with moec")

    def _named(self) -> dict[str, tuple[Any, Any]]:
        """Name -> tensor and its subgraph, for all tensors with stored values."""
        found: dict[str, tuple[Any, Any]] = {}
        for place in range(self.model.SubgraphsLength()):
            graph = self.model.Subgraphs(place)
            for index in range(graph.TensorsLength()):
                tensor = graph.Tensors(index)
                if tensor.Buffer() and tensor.Name():
                    found.setdefault(tensor.Name().decode(), (tensor, graph))
        return found

    def buffer(self, index: int) -> np.ndarray:
        """Bytes of a buffer, uint8, whether it lies inside or outside the flatbuffer."""
        buffer = self.model.Buffers(index)
        if buffer.Offset() > 1:
            return np.frombuffer(self._data, np.uint8, buffer.Size(), buffer.Offset())
        data: np.ndarray = buffer.DataAsNumpy()
        return data

    def read(self, name: str) -> np.ndarray | Codes:
        """The values of a float tensor, or `Codes` of a quantized one.

        Raises:
            ArtifactError: The file has no tensor called `name`.
        """
        tensor, graph = self._tensor(name)
        shape, kind, data = tuple(tensor.ShapeAsNumpy()), self._kind(tensor), self.buffer(tensor.Buffer())
        if kind not in _BITS:
            return data.view(_DTYPES[kind]).reshape(shape)
        codes = (data.view(np.int8) if kind == "INT8" else unpack_int4(data)).reshape(shape)
        scales = self._scales(tensor, graph).reshape(*shape[:-1], -1)
        return Codes(_BITS[kind], codes, scales, shape[-1] // scales.shape[-1])

    def _tensor(self, name: str) -> tuple[Any, Any]:
        if name not in self._tensors:
            raise ArtifactError(f"{self._path}: no tensor {name}", hint="export the model again")
        return self._tensors[name]

    def _kind(self, tensor: Any) -> str:
        """Tensor type, as the schema names it."""
        kinds: dict[int, str] = {
            value: key for key, value in vars(self._schema.TensorType).items() if not key.startswith("_")
        }
        return kinds[tensor.Type()]

    def _scales(self, tensor: Any, graph: Any) -> np.ndarray:
        quantization = tensor.Quantization()
        if quantization.DetailsType() != self._schema.QuantizationDetails.BlockwiseQuantization:
            scales: np.ndarray = quantization.ScaleAsNumpy()
            return scales
        details = self._schema.BlockwiseQuantization()
        details.Init(quantization.Details().Bytes, quantization.Details().Pos)
        return self.buffer(graph.Tensors(details.Scales()).Buffer()).view("<f2")

    def stored_weights(self) -> Mapping[str, StoredWeight]:
        """Every tensor of experts, every embedding and every quantized matrix, by its name in the Program."""
        entries: Mapping[str, Mapping[str, bool]] = self.facts["experts"]
        found = {
            name: StoredWeight(self._bits(f"{name}.0"), partial(self._experts, name, entry))
            for name, entry in entries.items()
        }
        for name, (tensor, _) in self._tensors.items():
            of_expert = name.rpartition(".")[0] in entries
            if not of_expert and tensor.Quantization() is not None and (bits := self._bits(name)) is not None:
                found[name] = StoredWeight(bits, partial(self._matrix, name))
        return found | {
            name: StoredWeight(self._bits(name), partial(self._matrix, name)) for name in self.facts.get("tables", ())
        }

    def _bits(self, name: str) -> int | None:
        return _BITS.get(self._kind(self._tensor(name)[0]))

    def _matrix(self, name: str, start: int, stop: int) -> Codes | np.ndarray:
        found = self.read(name)
        return found.cut(start, stop) if isinstance(found, Codes) else found[start:stop]

    def _experts(self, name: str, entry: Mapping[str, bool], start: int, stop: int) -> Codes | np.ndarray:
        return stack([_in_program(entry, self.read(f"{name}.{index}")) for index in range(start, stop)])


def _in_program(entry: Mapping[str, bool], value: Any) -> Any:
    """The tensor [N, ...] of one expert, converted to the layout of the Program."""
    if isinstance(value, Codes):
        return replace(value, codes=_in_program(entry, value.codes), scales=_in_program(entry, value.scales))
    if entry["interleaved"]:
        value = np.stack(np.split(value, 2), axis=1).reshape(value.shape)
    return np.ascontiguousarray(value.T) if entry["transposed"] else value


def unpack_int4(data: np.ndarray) -> np.ndarray:
    """Unpack bytes of two signed codes each, the first in the low nibble, into a flat int8 array."""
    halves = np.stack([data & 0xF, data >> 4], axis=-1).reshape(-1)
    codes: np.ndarray = ((halves ^ 8).astype(np.int16) - 8).astype(np.int8)
    return codes
