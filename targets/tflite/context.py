"""What a lowering function works with: the subgraph being built, values by fx node, constants and weights.

All shapes are constant here. What depends on nothing but constants is computed while lowering and becomes one.
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
"""Type of a value by the dtype in the graph: LiteRT computes in float32 and int32; fp16 is a way to store weights."""

NUMPY = {"FLOAT32": np.dtype(np.float32), "INT32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_)}
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True)
class Settings:
    """Choices of one signature that lowering functions consult; `older`: for tflite-runtime 2.14."""

    capacity: int
    branches: bool
    older: bool = False


@dataclass(eq=False)
class Shared:
    """What all signatures of a model share.

    Attributes:
        program: The Program before any axis was fixed.
        weights: Its tensors as the file holds them.
        experts: Program name of an expert tensor -> how to find it in the file.
        rejections: Where something took another form than it would best have.
        idle: The branches that do nothing, by the types of their operands.
    """

    program: Program
    weights: Weights
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    idle: dict[Any, Graph] = field(default_factory=dict)


class Context:
    """State of the lowering of one signature.

    Args:
        shared: See there.
        settings: See there.
        graph: The subgraph to fill.
    """

    def __init__(self, shared: Shared, settings: Settings, graph: Graph) -> None:
        self.shared, self.settings, self.graph = shared, settings, graph
        self._values: dict[fx.Node, Any] = {}
        self._memo: dict[Any, Any] = {}

    # Values -----------------------------------------------------------------------------------------------------

    def set(self, node: fx.Node, value: Any) -> None:
        """Remember what `node` lowered to; its shape must be the one that the trace found."""
        fake = node.meta.get("val")
        if isinstance(value, Value) and isinstance(fake, torch.Tensor):
            found, wanted = (value.shape, value.dtype), (tuple(fake.shape), TENSOR_TYPES[fake.dtype])
            assert found == wanted, f"{node.name}: {node.target} lowered to {found}, traced as {wanted}"
        self._values[node] = value

    def bind(self, node: fx.Node, value: Value) -> None:
        """Let `value` stand for a state, whose length here is the capacity of the cache and not the past."""
        self._values[node] = value

    def get(self, argument: Any) -> Any:
        """The lowered form of an argument: a Value or a constant for a tensor, the rest as it is."""
        if isinstance(argument, fx.Node):
            if argument.op == "get_attr":
                return self.weight(argument)
            return self._values[argument]
        if isinstance(argument, list | tuple):
            return [self.get(item) for item in argument]
        return argument

    def known(self, argument: Any) -> torch.Tensor | None:
        """The values of an argument that is a constant, else None."""
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
        """`value` as the tensor type `kind`."""
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
            name: As in the schema.
            inputs: None where an optional one is left out.
            shape: Of the output; None: the broadcast of the inputs' shapes.
            dtype: Tensor type of the output; None: that of the first input.
            options: Fields of the options table.
        """
        first = inputs[0]
        assert first is not None
        if shape is None:
            shape = np.broadcast_shapes(*(value.shape for value in inputs if value is not None))
        return self.graph.op(name, inputs, [(shape, dtype or first.dtype)], options)[0]

    def shared_value(self, key: Any, make: Callable[[], Value]) -> Value:
        """`make()` the first time that `key` is asked for, then the same value: masks and indices of every layer."""
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
        """`length` indices of one axis, from `start`."""
        begin, size = [0] * value.rank, list(value.shape)
        if size[axis] == length:
            return value
        begin[axis], size[axis] = start, length
        return self.op("SLICE", value, self.ints(*begin), self.ints(*size), shape=size)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """Values joined along an axis; CONCATENATION takes none without elements."""
        parts = [part for part in parts if 0 not in part.shape] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.op("CONCATENATION", *parts, shape=shape, axis=axis)

    def unsqueeze(self, value: Value, axes: Sequence[int]) -> Value:
        """`value` with axes of length 1 at these places."""
        shape = list(value.shape)
        for axis in sorted(axes):
            shape.insert(axis, 1)
        return self.reshape(value, tuple(shape))

    def squeeze(self, value: Value, axes: Sequence[int]) -> Value:
        """`value` without these axes."""
        return self.reshape(value, tuple(size for axis, size in enumerate(value.shape) if axis not in axes))

    def split(self, value: Value, sizes: Sequence[int], axis: int) -> Sequence[Value]:
        """Pieces of an axis: SPLIT where they are alike, which XNNPACK takes as well."""
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
        """`source` at `places`. Negative ones count from the end, and GATHER takes none."""
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
        """A small constant; integers are cut to the range of int32 (torch's bounds may lie beyond)."""
        kind = TENSOR_TYPES[dtype]
        array = np.asarray(value)
        if kind == "INT32":
            array = np.clip(array, _INT32.min, _INT32.max)
        return self.graph.constant(array.astype(NUMPY[kind]))

    def scalar(self, value: float) -> Value:
        """A float32 constant without axes."""
        return self.constant(np.asarray(value, np.float32))

    def ints(self, *values: int) -> Value:
        """A 1-D int32 constant."""
        return self.constant(np.asarray(values, np.int32), torch.int32)

    def weight(self, node: fx.Node) -> Value:
        """The Program's tensor behind a `get_attr` node, in float32.

        Raises:
            LoweringError: The plan quantizes it, and whoever asks can only use floats.
        """
        weight = self.shared.weights.plain(str(node.target), node.meta["val"].dtype)
        return self.float32(self.graph.weight(weight))

    def float32(self, value: Value) -> Value:
        """A weight that is stored in half precision or as codes, as float32."""
        if value.dtype not in {"FLOAT16", "INT8"}:
            return value
        return self.shared_value(("float32", value), lambda: self.op("DEQUANTIZE", value, dtype="FLOAT32"))

    def branch(self, name: str) -> Context:
        """A context for a branch of its own."""
        return Context(self.shared, self.settings, Graph(name))


def _schema() -> Any:
    from moec.targets.tflite.library import schema

    return schema()
