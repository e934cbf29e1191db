"""What lowering functions work with: the subgraph being built, values by fx node, constants and weights.

All shapes are static here. Nodes that depend only on constants are computed during lowering and become constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program
from moec.targets.tflite.model import Graph, Value
from moec.targets.tflite.weights import Weights

TENSOR_TYPES: Mapping[torch.dtype, str] = {
    torch.float64: "FLOAT32",
    torch.float32: "FLOAT32",
    torch.float16: "FLOAT32",
    torch.bfloat16: "FLOAT32",
    torch.int64: "INT32",
    torch.int32: "INT32",
    torch.int16: "INT32",
    torch.int8: "INT32",
    torch.uint8: "INT32",
    torch.bool: "BOOL",
}
"""dtype in the graph -> tensor type. LiteRT computes in float32 and int32; fp16 is only a way to store weights."""

NUMPY = {"FLOAT32": np.dtype(np.float32), "INT32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_)}
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one signature.

    Attributes:
        capacity: Slots of the KV cache.
        branches: Whether each expert is the branch of an IF, which is skipped where no token needs it.
        legacy: Whether the file is for tflite-runtime 2.14.
    """

    capacity: int
    branches: bool
    legacy: bool = False


@dataclass(eq=False)
class Shared:
    """What all signatures of a model share.

    Attributes:
        program: The Program with dynamic axes.
        weights: Its tensors in the form that the file holds.
        experts: Program name of an expert tensor -> how to find it in the file.
        tables: Names of the embeddings.
        rejections: Why nodes were not lowered to the fastest form.
        idle: Branches for experts without tokens, by the types of their operands.
    """

    program: Program
    weights: Weights
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    rejections: list[Rejection] = field(default_factory=list)
    idle: dict[Any, Graph] = field(default_factory=dict)


class Context:
    """State of the lowering of one signature.

    Args:
        shared: What all signatures share.
        settings: Settings of this signature.
        graph: The subgraph to append to.
    """

    def __init__(self, shared: Shared, settings: Settings, graph: Graph) -> None:
        self.shared, self.settings, self.graph = shared, settings, graph
        self._values: dict[fx.Node, Any] = {}
        self._memo: dict[Any, Any] = {}

    # Values -----------------------------------------------------------------------------------------------------

    def set(self, node: fx.Node, value: Any) -> None:
        """Record what `node` was lowered to; its shape must be that of the trace."""
        fake = node.meta.get("val")
        if isinstance(value, Value) and isinstance(fake, torch.Tensor):
            found, wanted = (value.shape, value.dtype), (tuple(fake.shape), TENSOR_TYPES[fake.dtype])
            assert found == wanted, f"{node.name}: {node.target} lowered to {found}, traced as {wanted}"
        self._values[node] = value

    def bind(self, node: fx.Node, value: Value) -> None:
        """Record `value` for a state, whose length is the capacity of the cache, unlike in the trace."""
        self._values[node] = value

    def get(self, argument: Any) -> Any:
        """What an argument was lowered to: a Value or a torch constant for a tensor; other arguments unchanged."""
        if isinstance(argument, fx.Node):
            if argument.op == "get_attr":
                return self.weight(argument)
            return self._values[argument]
        if isinstance(argument, list | tuple):
            return [self.get(item) for item in argument]
        return argument

    def known(self, argument: Any) -> torch.Tensor | None:
        """The value of an argument that is constant; None if it is not."""
        value = self._values.get(argument) if isinstance(argument, fx.Node) else None
        return value if isinstance(value, torch.Tensor) else None

    def tensor(self, argument: Any, dtype: torch.dtype | None = None) -> Value:
        """`argument` as a Value, cast to `dtype` if it has another one."""
        value = self.get(argument)
        if isinstance(value, Value):
            return value if dtype is None else self.cast(value, TENSOR_TYPES[dtype])
        if not isinstance(value, torch.Tensor):
            kind = dtype or (torch.float32 if isinstance(value, float) else torch.int64)
            value = torch.tensor(value, dtype=kind)
        return self.constant(value.numpy(), dtype or value.dtype)

    def cast(self, value: Value, kind: str) -> Value:
        """`value` cast to the tensor type `kind`, such as "INT32"."""
        if value.dtype == kind:
            return value
        names = {"FLOAT32": "FLOAT32", "INT32": "INT32", "BOOL": "BOOL"}
        schema = _schema().TensorType
        options = {"inDataType": getattr(schema, names[value.dtype]), "outDataType": getattr(schema, names[kind])}
        return self.op("CAST", value, dtype=kind, **options)

    # Operators --------------------------------------------------------------------------------------------------

    def op(
        self,
        name: str,
        *inputs: Value | None,
        shape: Sequence[int] | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> Value:
        """Append an operator with one output.

        Args:
            name: Name of the operator in LiteRT's schema.
            inputs: Its inputs; None for an optional input that is left out.
            shape: Shape of the output; None: the broadcast of the inputs' shapes.
            dtype: Tensor type of the output; None: that of the first input.
            options: Fields of the operator's options table.
        """
        first = inputs[0]
        assert first is not None
        if shape is None:
            shape = np.broadcast_shapes(*(value.shape for value in inputs if value is not None))
        return self.graph.op(name, inputs, [(shape, dtype or first.dtype)], options)[0]

    def shared_value(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value of `make()`, called once for each `key`: masks and indices that all layers share."""
        if key not in self._memo:
            self._memo[key] = make()
        value: Value = self._memo[key]
        return value

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """`value` in another shape."""
        if tuple(shape) == value.shape:
            return value
        return self.op("RESHAPE", value, self.ints(*shape), shape=shape, newShape=list(shape))

    def transpose(self, value: Value, axes: Sequence[int]) -> Value:
        """`value` with its axes in another order."""
        shape = [value.shape[axis] for axis in axes]
        moved = [axis for axis in axes if value.shape[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(value, shape)
        return self.op("TRANSPOSE", value, self.ints(*axes), shape=shape)

    def slice(self, value: Value, axis: int, start: int, length: int) -> Value:
        """`length` elements of one axis, from `start`."""
        begin, size = [0] * value.rank, list(value.shape)
        if size[axis] == length:
            return value
        begin[axis], size[axis] = start, length
        return self.op("SLICE", value, self.ints(*begin), self.ints(*size), shape=size)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """`parts` concatenated along an axis, without empty ones, which CONCATENATION does not take."""
        parts = [part for part in parts if 0 not in part.shape] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.op("CONCATENATION", *parts, shape=shape, axis=axis)

    def unsqueeze(self, value: Value, axes: Sequence[int]) -> Value:
        """`value` with new axes of length 1; `axes` are their indices in the result."""
        shape = list(value.shape)
        for axis in sorted(axes):
            shape.insert(axis, 1)
        return self.reshape(value, tuple(shape))

    def squeeze(self, value: Value, axes: Sequence[int]) -> Value:
        """`value` without these axes."""
        return self.reshape(value, tuple(size for axis, size in enumerate(value.shape) if axis not in axes))

    def split(self, value: Value, sizes: Sequence[int], axis: int) -> Sequence[Value]:
        """`value` cut along an axis: by SPLIT, which XNNPACK supports too, where all `sizes` are equal."""
        shapes = [[*value.shape[:axis], size, *value.shape[axis + 1 :]] for size in sizes]
        outputs = [(shape, value.dtype) for shape in shapes]
        place = self.constant(np.int32(axis), torch.int32)
        if len(set(sizes)) == 1:
            return self.graph.op("SPLIT", [place, value], outputs, {"numSplits": len(sizes)})
        return self.graph.op("SPLIT_V", [value, self.ints(*sizes), place], outputs, {"numSplits": len(sizes)})

    def tile(self, value: Value, times: Sequence[int]) -> Value:
        """`value` repeated along each axis."""
        shape = [size * count for size, count in zip(value.shape, times, strict=True)]
        return value if tuple(shape) == value.shape else self.op("TILE", value, self.ints(*times), shape=shape)

    def gather(self, value: Value, index: Value, axis: int) -> Value:
        """`value` at `index` along `axis`."""
        shape = (*value.shape[:axis], *index.shape, *value.shape[axis + 1 :])
        return self.op("GATHER", value, index, shape=shape, axis=axis)

    def take(self, source: fx.Node, places: fx.Node, axis: int) -> Value:
        """`source` at the indices `places` along an axis; negative indices count from the end."""
        value = self.tensor(source)
        size = self.constant(np.int32(value.shape[axis]), torch.int32)
        return self.gather(value, self.op("FLOOR_MOD", self.tensor(places, torch.int64), size), axis)

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """`value` broadcast to `shape`."""
        if tuple(shape) == value.shape:
            return value
        return self.op("BROADCAST_TO", value, self.ints(*shape), shape=shape)

    def reduce(self, name: str, value: Value, axes: Sequence[int], *, keep: bool) -> Value:
        """A reduction over `axes`."""
        kept = enumerate(value.shape)
        shape = [1 if axis in axes else size for axis, size in kept if keep or axis not in axes]
        return self.op(name, value, self.ints(*axes), shape=shape, keepDims=keep)

    # Constants and weights --------------------------------------------------------------------------------------

    def constant(self, value: Any, dtype: torch.dtype = torch.float32) -> Value:
        """A small constant; integers are clamped to the range of int32, which torch's bounds may exceed."""
        kind = TENSOR_TYPES[dtype]
        array = np.asarray(value)
        if kind == "INT32":
            array = np.clip(array, _INT32.min, _INT32.max)
        return self.graph.constant(array.astype(NUMPY[kind]))

    def scalar(self, value: float) -> Value:
        """A float32 scalar constant."""
        return self.constant(np.asarray(value, np.float32))

    def ints(self, *values: int) -> Value:
        """A 1-D int32 constant."""
        return self.constant(np.asarray(values, np.int32), torch.int32)

    def weight(self, node: fx.Node) -> Value:
        """The Program's tensor behind a `get_attr` node, in float32.

        Raises:
            LoweringError: The plan quantizes the tensor, but the op that uses it takes only floats.
        """
        weight = self.shared.weights.plain(str(node.target), node.meta["val"].dtype)
        return self.float32(self.graph.weight(weight))

    def float32(self, value: Value) -> Value:
        """A weight that is stored in half precision or quantized, dequantized to float32."""
        if value.dtype not in {"FLOAT16", "INT8"}:
            return value
        return self.shared_value(("float32", value), lambda: self.op("DEQUANTIZE", value, dtype="FLOAT32"))

    def branch(self, name: str) -> Context:
        """A context for a new subgraph, called `name`, of a branch or loop."""
        return Context(self.shared, self.settings, Graph(name))


def _schema() -> Any:
    from moec.targets.tflite.library import schema

    return schema()
