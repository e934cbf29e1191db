"""What lowering functions work with: the ONNX graph being built, values by fx node, constants, sizes and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import Program, module_of
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.lazy import Float16

DTYPES: Mapping[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
MS = "com.microsoft"


Lowering = Callable[["Context", fx.Node], Any]
"""Emits the ONNX nodes for one fx node and returns its value, or its values."""


@dataclass(frozen=True)
class Dialect:
    """Which ONNX operators may be written. The ONNX and TensorRT targets share this lowering with different dialects.

    Attributes:
        target: Name of the target, for messages.
        table: Op of the graph -> function that emits its ONNX nodes.
        opset: Version of the standard operator set.
        contrib: Whether ops of the `com.microsoft` domain may be used.
        shared_buffer: Whether past and present of a layer may share one buffer that is longer than the sequence.
        grouped: Whether each float expert has its own matrix products, in place of the `MoE` kernel.
        input_defaults: Whether an input may have a default value.
        recent_qmoe: Whether `QMoE` may have the input `router_weights` and the attribute `accuracy_level`. ONNX Runtime
            web 1.30 does not know the attribute, and its WebGPU kernel refuses the input.
        decode: Whether quantized weights are `DequantizeLinear` before a product, see `lowerings.decoded`.
    """

    target: str
    table: Mapping[Any, Lowering]
    opset: int = 24
    contrib: bool = False
    shared_buffer: bool = False
    grouped: bool = False
    input_defaults: bool = True
    recent_qmoe: bool = True
    decode: bool = False


AXIS_NAMES = {
    "batch": "batch_size",
    "sequence": "sequence_length",
    "past_sequence": "past_sequence_length",
    "total_sequence": "total_sequence_length",
}
"""Dynamic axes as optimum names them: transformers.js looks for `batch_size` when it makes an empty past."""
CUT_SEQUENCE = "logits_length"
"""Name of the axis of the tokens whose logits are computed: values with axes of one name must be equally long."""


class Context:
    """State of one lowering.

    Args:
        program: The Program to lower.
        dialect: Which ONNX operators may be written.
        untransposed: Weights of linears that other ops use too, and which are therefore not stored transposed.
    """

    def __init__(self, program: Program, dialect: Dialect, untransposed: frozenset[str] = frozenset()) -> None:
        self.program, self.dialect, self.untransposed = program, dialect, untransposed
        self.module = ""
        self.origins: dict[str, str] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, tuple[ir.Value, LazyTensor]] = {}
        # Where experts, embeddings and quantized weights are in the file: `moec.targets.onnx.stored.TABLE`.
        self.experts: dict[str, dict[str, Any]] = {}
        self.others: dict[str, dict[str, Any]] = {}
        # Of each experts node: role -> value and dtype. A lowering may replace them by the values that it uses itself.
        self.layers: list[dict[str, tuple[ir.Value, torch.dtype]]] = []
        self.rejections: list[Rejection] = []
        self.memo: dict[Any, Any] = {}
        # Nodes whose values hold only the last tokens, see `lowerings.last_logits`.
        self.cut: set[fx.Node] = set()
        self._values: dict[fx.Node, Any] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._symbols = {str(symbol): AXIS_NAMES.get(name, name) for name, symbol in program.dims.items()}
        self._counter = 0

    # Values -----------------------------------------------------------------------------------------------------

    def set(self, node: fx.Node, value: Any) -> None:
        """Record what `node` was lowered to, and give the value the type and shape of the trace."""
        self._values[node] = value
        fake = node.meta.get("val")
        if isinstance(value, ir.Value) and isinstance(fake, torch.Tensor) and value.name not in self.initializers:
            value.type = ir.TensorType(DTYPES[fake.dtype])
            value.shape = self.traced_shape(node)

    def __contains__(self, node: fx.Node) -> bool:
        """Whether `node` has been lowered."""
        return node in self._values

    def get(self, argument: Any) -> Any:
        """What an argument was lowered to: a Value for a tensor; numbers and lists unchanged."""
        if isinstance(argument, fx.Node):
            if argument.op == "get_attr":
                return self.weight(str(argument.target), argument.meta["val"].dtype)
            return self._values[argument]
        if isinstance(argument, list | tuple):
            return [self.get(item) for item in argument]
        return argument

    def tensor(self, argument: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """`argument` as a tensor Value, cast to `dtype` if it has another one."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor):
            value = self.get(argument)
            assert isinstance(value, ir.Value)
            have = argument.meta["val"].dtype
            return value if dtype in (None, have) else self.op("Cast", value, to=int(DTYPES[dtype]))
        if isinstance(argument, fx.Node):
            scalar = self.size(argument)
            return scalar if dtype in (None, torch.int64) else self.op("Cast", scalar, to=int(DTYPES[dtype]))
        if dtype is None:
            dtype = torch.float32 if isinstance(argument, float) else torch.int64
        return self.constant(np.asarray(argument, dtype=np_dtype(dtype)))

    def shape_of(self, sizes: Sequence[Any]) -> ir.Shape:
        """A torch shape, with symbolic sizes, as an ONNX shape."""
        return ir.Shape([self.dim(size) for size in sizes])

    def traced_shape(self, node: fx.Node) -> ir.Shape:
        """The shape of the value of `node`, with symbolic sizes."""
        shape = self.shape_of(node.meta["val"].shape)
        if node not in self.cut:
            return shape
        return ir.Shape([CUT_SEQUENCE if size == AXIS_NAMES["sequence"] else size for size in shape])

    def dim(self, size: Any) -> int | str:
        """A torch size as a number or the name of an axis."""
        if isinstance(size, int):
            return size
        text = str(size)
        for symbol, name in self._symbols.items():
            text = text.replace(symbol, name)
        return text

    # Nodes ------------------------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output and return that output."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs and return them."""
        operands = list(inputs)
        # An optional input that is named but empty crashes some kernels of ONNX Runtime (LayerNormalization's bias).
        while operands and operands[-1] is None:
            operands.pop()
        node = ir.node(op_type, operands, attributes, domain=domain, num_outputs=outputs)
        self._counter += 1
        node.name = f"{op_type}_{self._counter}"
        self.origins[node.name] = self.module
        for index, output in enumerate(node.outputs):
            output.name = f"{op_type.lower()}_{self._counter}" + (f"_{index}" if outputs > 1 else "")
        self.nodes.append(node)
        return node.outputs

    # Operators: see `moec.targets.common.lowerings.Operators` -----------------------------------------------------

    def transpose(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """`value` with its axes in another order."""
        return self.op("Transpose", value, perm=list(axes))

    def unsqueeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """`value` with new axes of length 1; `axes` are their indices in the result."""
        return self.op("Unsqueeze", value, self.ints(*axes))

    def squeeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """`value` without these axes."""
        return self.op("Squeeze", value, self.ints(*axes))

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        """`parts` concatenated along an axis."""
        return self.op("Concat", *parts, axis=axis)

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> Sequence[ir.Value]:
        """`value` cut along an axis into pieces of `sizes`."""
        return self.ops("Split", value, self.ints(*sizes), outputs=len(sizes), axis=axis)

    def tile(self, value: ir.Value, times: Sequence[Any]) -> ir.Value:
        """`value` repeated along each axis."""
        return self.op("Tile", value, self.dims(times))

    def size_arithmetic(self, name: str, *sizes: ir.Value) -> ir.Value:
        """Arithmetic on sizes."""
        return self.op({"floordiv": "Div"}.get(name, name.capitalize()), *sizes)

    def take(self, source: fx.Node, places: fx.Node, axis: int) -> ir.Value:
        """`source` at the indices `places` along an axis; negative indices count from the end."""
        return self.op("Gather", self.tensor(source), self.tensor(places), axis=axis)

    @contextlib.contextmanager
    def subgraph(self, name: str) -> Iterator[ir.Graph]:
        """Collect the nodes made inside in a new graph, a loop body or a branch. The caller appends its outputs.

        A value that was made inside cannot be used outside, so the memo of shared values starts empty.
        """
        outer, memo = self.nodes, self.memo
        self.nodes, self.memo = [], {}
        graph = ir.Graph([], [], nodes=[], name=name)
        try:
            yield graph
            graph.extend(self.nodes)
        finally:
            self.nodes, self.memo = outer, memo

    def shared(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        """The value of `make()`, called once for each `key`: masks and sizes that all layers share."""
        if key not in self.memo:
            self.memo[key] = make()
        value: ir.Value = self.memo[key]
        return value

    def begin_layer(self, node: fx.Node) -> None:
        """Record the operands of an experts node, so that the experts of this layer can be run alone from them."""
        own = Experts.of(node)
        roles = {"hidden_states": own.hidden_states, "indices": own.indices, "weights": own.weights}
        self.layers.append({role: (self.tensor(item), item.meta["val"].dtype) for role, item in roles.items()})

    # Constants and weights --------------------------------------------------------------------------------------

    def constant(self, value: Any, dtype: Any = None) -> ir.Value:
        """A small constant as an initializer; equal constants are one initializer."""
        array = np.array(value, dtype=dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const_{len(self._constants)}"
            tensor = ir.Tensor(array, name=name)
            self._constants[key] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.constant(np.asarray(values, dtype=np.int64))

    def constants(self) -> list[ir.Value]:
        """Every small constant made so far."""
        return list(self._constants.values())

    def initializer(
        self,
        name: str,
        tensor: LazyTensor,
        *,
        half: bool = False,
        packed: tuple[ir.DataType, Sequence[int]] | None = None,
    ) -> ir.Value:
        """A weight, kept lazy until the file is written. A name that was used before returns the same value.

        Args:
            name: Name in the file.
            tensor: The values.
            half: Whether to store it as float16; the runtime casts it when the model is loaded.
            packed: ONNX type and shape that the bytes of `tensor` encode, where torch has no such type.
        """
        if half and tensor.dtype is torch.float32:
            stored = self.initializer(f"{name}.fp16", tensor.cast(torch.float16))
            return self.shared(("half", name), lambda: self.op("Cast", stored, to=int(ir.DataType.FLOAT)))
        if name not in self.initializers:
            dtype, shape = packed or (DTYPES[tensor.dtype], tensor.shape)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
            self.initializers[name] = (value, tensor)
        return self.initializers[name][0]

    def weight(self, name: str, dtype: torch.dtype) -> ir.Value:
        """The Program's tensor called `name` in its own layout, cast to `dtype`."""
        name = self.program.weights.resolve(name)
        return self.initializer(name, self.program.weights[name].cast(dtype), half=self.stored_half(name))

    def stored_half(self, name: str) -> bool:
        """Whether the plan stores this tensor in half precision."""
        return isinstance(self.program.weights[name], Float16)

    def lazy(self, node: fx.Node) -> LazyTensor:
        """The lazy tensor behind a `get_attr` node, in the dtype of the graph."""
        return self.program.weights[str(node.target)].cast(node.meta["val"].dtype)

    def bytes_of(self, name: str) -> int:
        """Bytes in the file of all initializers that hold the Program's tensor `name`."""
        return sum(tensor.nbytes for key, (_, tensor) in self.initializers.items() if key.startswith(f"{name}."))

    # Sizes ------------------------------------------------------------------------------------------------------

    def size(self, argument: Any) -> ir.Value:
        """A size as an int64 scalar Value; its nodes are made on first use."""
        if isinstance(argument, int):
            return self.constant(np.int64(argument))
        value = self._values[argument]
        made: ir.Value = value() if callable(value) else value
        return made

    def dims(self, sizes: Sequence[Any]) -> ir.Value:
        """A list of sizes, each an integer or a node, as a 1-D int64 Value."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(*sizes)
        parts = [
            self.ints(size) if isinstance(size, int) else self.op("Reshape", self.size(size), self.ints(1))
            for size in sizes
        ]
        return self.op("Concat", *parts, axis=0)

    def axis_length(self, node: fx.Node, axis: int) -> ir.Value:
        """Length of one axis of a tensor, as an int64 scalar; equal lengths share one value."""
        size = node.meta["val"].shape[axis]
        if isinstance(size, int):
            return self.constant(np.int64(size))

        def make() -> ir.Value:
            shape = self.op("Shape", self.get(node), start=axis, end=axis + 1)
            return self.op("Squeeze", shape, self.ints(0))

        return self.shared(("size", str(size)), make)

    # Messages ---------------------------------------------------------------------------------------------------

    def reject(self, node: fx.Node, reason: str) -> None:
        """Record why `node` was not lowered to the fastest form."""
        self.rejections.append(Rejection(self.dialect.target, module_of(node), reason))


def np_dtype(dtype: torch.dtype) -> Any:
    """The numpy dtype of a torch dtype."""
    return torch.empty(0, dtype=dtype).numpy().dtype
