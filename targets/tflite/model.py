"""A `.tflite` model in memory, before it is written: subgraphs, operators, tensors and lazy weights.

It mirrors LiteRT's schema without the indirections of the file format: an operator has a name rather than an index of
an operator code, and weights that several subgraphs share exist once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Chunk = tuple[np.ndarray, np.ndarray | None]
"""Bytes (uint8) of some rows of a weight and, if quantized, their scales (float32; float16 for blocks)."""

DTYPES: Mapping[str, str] = {
    "float32": "FLOAT32",
    "float16": "FLOAT16",
    "int32": "INT32",
    "int8": "INT8",
    "bool": "BOOL",
}
"""numpy dtype -> tensor type in LiteRT's schema."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor whose values are computed when the file is written.

    Attributes:
        name: Name in the file, by which readers find it.
        shape: Shape in the file.
        dtype: Tensor type: FLOAT32, INT32, FLOAT16, INT8 or INT4 (two codes per byte, the first in the low nibble).
        chunks: Yields the values in row-major order, with their scales.
        block: Block size: weights of a row that share a scale; 0 for a float tensor, the row's length per channel.
        dynamic: Whether kernels multiply its codes with activations that they round to int8, row by row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: Callable[[], Iterator[Chunk]]
    block: int = 0
    dynamic: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without scales."""
        bits = {"FLOAT32": 32, "INT32": 32, "FLOAT16": 16, "INT8": 8, "BOOL": 8, "INT4": 4}[self.dtype]
        return (math.prod(self.shape) * bits + 7) // 8

    @property
    def total_bytes(self) -> int:
        """Bytes of the values and scales."""
        return self.nbytes + self.scale_count * (2 if self.blockwise else 4)

    @property
    def blockwise(self) -> bool:
        """Whether a row has several scales, which the file then holds as a separate fp16 tensor."""
        return 0 < self.block < self.shape[-1]

    @property
    def scale_count(self) -> int:
        """Number of scales."""
        return math.prod(self.shape) // self.block if self.block else 0


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """A tensor of one subgraph; `index` is its index in the tensor table."""

    index: int
    shape: tuple[int, ...]
    dtype: str
    graph: Graph

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a subgraph's tensor table. At most one of `data`, `weight` and `scales_of` is set."""

    shape: tuple[int, ...]
    dtype: str
    name: str = ""
    data: bytes | None = None
    weight: Weight | None = None
    scales_of: Weight | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator; `inputs` and `outputs` are tensor indices, -1 for an optional input that is left out.

    `branches` are the two subgraphs of an IF, or condition and body of a WHILE.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    branches: tuple[Graph, Graph] | None = None


@dataclass(eq=False)
class Graph:
    """One subgraph."""

    name: str
    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    inputs: list[tuple[str, Value]] = field(default_factory=list)
    outputs: list[tuple[str, Value]] = field(default_factory=list)
    _constants: dict[Any, Value] = field(default_factory=dict)
    _weights: dict[Weight, Value] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> Value:
        """Append a tensor."""
        self.tensors.append(tensor)
        return Value(len(self.tensors) - 1, tensor.shape, tensor.dtype, self)

    def input(self, name: str, shape: Sequence[int], dtype: str) -> Value:
        """Append a tensor that is an input of the subgraph."""
        value = self.add(Tensor(tuple(shape), dtype, name))
        self.inputs.append((name, value))
        return value

    def output(self, name: str, value: Value) -> None:
        """Make `value` an output of the subgraph."""
        assert value.graph is self
        self.outputs.append((name, value))

    def constant(self, array: np.ndarray) -> Value:
        """A small constant; equal constants are one tensor."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.add(Tensor(array.shape, DTYPES[array.dtype.name], data=array.tobytes()))
        return self._constants[key]

    def is_constant(self, value: Value) -> bool:
        """Whether the file holds the values of a tensor of this subgraph."""
        tensor = self.tensors[value.index]
        return tensor.data is not None or tensor.weight is not None

    def weight(self, weight: Weight) -> Value:
        """A weight as a tensor of this subgraph; all subgraphs share its values in the file."""
        if weight not in self._weights:
            value = self.add(Tensor(weight.shape, weight.dtype, weight.name, weight=weight))
            self._weights[weight] = value
            if weight.blockwise:
                # The writer expects the scales of a blockwise weight in the next tensor.
                scales = (math.prod(weight.shape[:-1]), weight.shape[-1] // weight.block)
                self.add(Tensor(scales, "FLOAT16", f"{weight.name}.scales", scales_of=weight))
        return self._weights[weight]

    def op(
        self,
        name: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[tuple[Sequence[int], str]],
        options: Mapping[str, Any] | None = None,
        branches: tuple[Graph, Graph] | None = None,
    ) -> list[Value]:
        """Append an operator.

        Args:
            name: Name of the operator in the schema, such as "FULLY_CONNECTED".
            inputs: Its inputs; None for an optional input that is left out.
            outputs: Shape and tensor type of each output.
            options: Fields of its options table, by the schema's names.
            branches: The two subgraphs of an IF, or condition and body of a WHILE.
        """
        for value in inputs:
            assert value is None or value.graph is self, f"{name}: an operand of another subgraph"
        results = [self.add(Tensor(tuple(int(size) for size in shape), dtype)) for shape, dtype in outputs]
        indices = tuple(-1 if value is None else value.index for value in inputs)
        self.operators.append(Operator(name, indices, tuple(value.index for value in results), options or {}, branches))
        return results


@dataclass(eq=False)
class Model:
    """A whole model. `signatures` are the subgraphs that a runtime can call; other subgraphs are branches in these."""

    signatures: dict[str, Graph] = field(default_factory=dict)
    metadata: dict[str, bytes] = field(default_factory=dict)
    description: str = ""

    def graphs(self) -> list[Graph]:
        """Every subgraph once: signatures first, then branches in the order of first use."""
        found: dict[Graph, None] = dict.fromkeys(self.signatures.values())
        waiting = list(found)
        while waiting:
            following = [branch for graph in waiting for op in graph.operators if op.branches for branch in op.branches]
            waiting = [graph for graph in dict.fromkeys(following) if graph not in found]
            found.update(dict.fromkeys(waiting))
        return list(found)

    def weights(self) -> list[Weight]:
        """Every weight once, in the order of first use."""
        return list(dict.fromkeys(t.weight for graph in self.graphs() for t in graph.tensors if t.weight is not None))
