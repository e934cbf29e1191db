"""Where the weights of an artifact lie in its data files, as the kernels read them. Imports no torch.

A kernel reads what it packed of a constant if that is stored (`moec.targets.onnx.packing`), and else the constant
itself. Kernels of experts hold all experts of a layer in one such blob, one after another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from moec.compiler.common.errors import UsageError
from moec.targets.onnx.experts import LAYERS
from moec.targets.onnx.files import PACKED, model_path
from moec.targets.onnx.packing import external
from moec.targets.paging import WeightSizes

KERNELS = ("QMoE", "MoE")
"""Kernels that compute all experts of a layer and read only those that tokens are routed to."""
TABLES = ("Gather", "GatherBlockQuantized")
"""Operators that read single rows of their first input."""


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a data file.

    Attributes:
        file: Name of the file.
        offset: Where it begins, in bytes.
        length: Its number of bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of a MoE layer.

    Attributes:
        stacks: Places in which the experts lie one after another.
        count: Number of experts.
        indices: Name of the value with the experts of each token, [tokens, k].
        weights: Name of the value with their routing weights, [tokens, k].
    """

    stacks: tuple[Place, ...]
    count: int
    indices: str
    weights: str

    @property
    def size(self) -> int:
        """Bytes of one expert."""
        return sum(place.length for place in self.stacks) // self.count

    def places(self, expert: int, number: int = 1) -> Iterator[Place]:
        """Where an expert lies, or several beginning with it."""
        for place in self.stacks:
            length = place.length // self.count
            yield Place(place.file, place.offset + expert * length, number * length)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the weights lie.

    Attributes:
        dense: Weights that every token reads.
        tables: Weights of which a token reads one row.
        layers: The experts of each MoE layer.
        packed: Whether the kernels' own layout is stored.
    """

    dense: tuple[Place, ...]
    tables: tuple[Place, ...]
    layers: tuple[ExpertLayer, ...]
    packed: bool

    def sizes(self) -> WeightSizes:
        """Their sizes."""
        dense = sum(place.length for place in self.dense)
        return WeightSizes(dense, tuple(row.size for row in self.layers), tuple(row.count for row in self.layers))


def places_of(directory: Path) -> Places:
    """Read the graph of an artifact, or of packed weights.

    Raises:
        UsageError: The experts of a layer are no stacks that a kernel reads.
    """
    path = model_path(directory)
    model = onnx.load(path, load_external_data=False)
    stored = {item.name: item for item in model.graph.initializer if item.external_data}
    entries = {item.key: item.value for item in model.metadata_props}
    kernels = [node for node in model.graph.node if node.op_type in KERNELS]
    described = json.loads(entries.get(LAYERS, "[]"))
    if not described or len(described) != len(kernels):
        raise UsageError(
            f"{directory}: its experts are not computed by ONNX Runtime's kernels for experts",
            hint="export with --quantize int4 or int8, or with --experts kernel",
        )
    layers, of_experts = [], set[str]()
    for node, entry in zip(kernels, described, strict=True):
        found = [stored[name] for name in node.input if name in stored]
        layers.append(_layer(found, entry))
        of_experts |= {item.name for item in found}
    read = {name for node in model.graph.node for name in node.input[node.op_type in TABLES :]}
    dense = [place for name in sorted(read - of_experts) if name in stored for place in read_places(stored[name])]
    rows = [place for name in sorted(stored.keys() - read) for place in read_places(stored[name])]
    return Places(tuple(dense), tuple(rows), tuple(layers), any(_blobs(item) for item in stored.values()))


def _layer(found: list[onnx.TensorProto], entry: Mapping[str, tuple[str, int]]) -> ExpertLayer:
    count = max(found, key=lambda item: int(external(item)["length"])).dims[0]
    # Scales of packed codes are in the packed blob, and what is beside it is a few bytes for all experts.
    packed = [item for item in found if _blobs(item)]
    stacks = [max(_blobs(item), key=lambda place: place.length) for item in packed] if packed else []
    stacks += [] if packed else [place for item in found for place in read_places(item) if item.dims[0] == count]
    return ExpertLayer(tuple(stacks), count, entry["indices"][0], entry["weights"][0])


def read_places(item: onnx.TensorProto) -> tuple[Place, ...]:
    """What a kernel reads of a constant: what it packed, or the constant."""
    values = external(item)
    return _blobs(item) or (Place(values["location"], int(values.get("offset", 0)), int(values["length"])),)


def _blobs(item: onnx.TensorProto) -> tuple[Place, ...]:
    """Places of what kernels packed of a constant; empty if nothing is stored."""
    values = external(item)
    blobs = (blob for key, value in values.items() if key.startswith(PACKED) for blob in value.split("|")[1:])
    return tuple(Place(values["location"], *map(int, blob.split(";")[:2])) for blob in blobs)
