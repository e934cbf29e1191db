"""A program as read from its protobuf: functions, blocks, operations, constants.

The message is read directly rather than through coremltools' `milproto.load`: that rebuilds the program
with the MIL builder, which reads every weight, infers every type anew and folds constants, so what ran
would not be what was saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor.blob import BlobFile
from moec.targets.coreml.executor.constants import Constant
from moec.targets.coreml.executor.dtypes import BY_CODE, Array, TensorType, packed_bytes, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_HINT = "only ML programs written by coremltools or moec can be run"


@dataclass(frozen=True, slots=True)
class Value:
    """A named value of the program.

    Args:
        name: Name within its block and the blocks inside that.
        type: Element type and shape; of a state, those of its content.
        is_state: Whether it is a state rather than a tensor.
    """

    name: str
    type: TensorType
    is_state: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Args:
        type: Op type, such as `matmul`.
        name: Its `name` attribute, or else the name of its first output.
        inputs: Names and inlined constants bound to each parameter.
        outputs: What it defines.
        blocks: Nested blocks: both branches of `cond`, condition and body of `while_loop`.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[Value, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A list of operations with its own inputs and outputs."""

    inputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """One entry point of the program.

    Args:
        name: Its name.
        opset: Version of its op set: 5 is iOS 15, 6 iOS 16, 7 iOS 17, 8 iOS 18.
        inputs: Tensors and states that the caller provides.
        block: Its body.
    """

    name: str
    opset: int
    inputs: tuple[Value, ...]
    block: Block


def cut(function: Function, inputs: Sequence[str], output: str) -> Function:
    """The part of `function` that computes the value `output` from the values `inputs`."""
    makers = {value.name: operation for operation in function.block.operations for value in operation.outputs}
    types = {value.name: value for value in function.inputs}
    types |= {value.name: value for operation in makers.values() for value in operation.outputs}
    wanted: set[int] = set()
    pending = [output]
    while pending:
        name = pending.pop()
        if name not in inputs and name in makers and id(makers[name]) not in wanted:
            wanted.add(id(makers[name]))
            pending += _reads(makers[name])
    operations = tuple(operation for operation in function.block.operations if id(operation) in wanted)
    given = tuple(types[name] for name in dict.fromkeys(inputs))
    return Function(f"{function.name}, part", function.opset, given, Block((), operations, (output,)))


def _reads(operation: Operation) -> Iterator[str]:
    """Names that an operation and its nested blocks read, including names that these blocks define."""
    for bound in operation.inputs.values():
        yield from (item for item in bound if isinstance(item, str))
    for block in operation.blocks:
        yield from block.outputs
        for inner in block.operations:
            yield from _reads(inner)


class GraphReader:
    """Turns protobuf messages into the dataclasses above.

    Args:
        directory: Directory that `@model_path` in the program refers to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._blobs: dict[Path, BlobFile] = {}

    def function(self, name: str, message: Any) -> Function:
        """Read a `Function` message.

        Raises:
            ArtifactError: The message uses something that the format does not define.
        """
        blocks = message.block_specializations
        if message.opset not in blocks:
            raise ArtifactError(f"function {name} has no body for op set {message.opset!r}", hint=_HINT)
        version = message.opset.removeprefix("CoreML")
        if not version.isdigit():
            raise ArtifactError(f"function {name} uses the unknown op set {message.opset!r}", hint=_HINT)
        inputs = tuple(self._value(item) for item in message.inputs)
        return Function(name, int(version), inputs, self._block(blocks[message.opset]))

    def _block(self, message: Any) -> Block:
        return Block(
            inputs=tuple(self._value(item) for item in message.inputs),
            operations=tuple(self._operation(item) for item in message.operations),
            outputs=tuple(message.outputs),
        )

    def _operation(self, message: Any) -> Operation:
        outputs = tuple(self._value(item) for item in message.outputs)
        attributes = dict(message.attributes)
        named = attributes.pop("name", None)
        first = outputs[0].name if outputs else message.type
        name = str(self._inline(named, _tensor_type(named.type, first), first)) if named else first
        inputs: dict[str, tuple[str | Constant, ...]] = {
            key: (self._constant(f"{name}.{key}" if key != "val" else first, value),)
            for key, value in attributes.items()
        }
        for key, argument in message.inputs.items():
            inputs[key] = tuple(self._bindings(f"{name}.{key}", argument))
        blocks = tuple(self._block(block) for block in message.blocks)
        return Operation(message.type, name, inputs, outputs, blocks)

    def _bindings(self, where: str, argument: Any) -> Iterator[str | Constant]:
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "name":
                yield binding.name
            else:
                yield self._constant(where, binding.value)

    def _value(self, message: Any) -> Value:
        if message.type.WhichOneof("type") == "stateType":
            return Value(message.name, _tensor_type(message.type.stateType.wrappedType, message.name), True)
        return Value(message.name, _tensor_type(message.type, message.name))

    def _constant(self, name: str, message: Any) -> Constant:
        declared = _tensor_type(message.type, name)
        if message.WhichOneof("value") != "blobFileValue":
            array = self._inline(message, declared, name)
            key = (array.dtype.str, array.shape, array.tobytes())
            return Constant(name, declared, 0, key, lambda: array, keep=False)
        shape = _static_shape(declared, name)
        path = self._blob_path(message.blobFileValue.fileName, name)
        blob = self._blobs.setdefault(path, BlobFile(path))
        offset = int(message.blobFileValue.offset)
        element = declared.element
        return Constant(
            name=name,
            type=declared,
            stored_bytes=packed_bytes(int(np.prod(shape, dtype=np.int64)), element.bits),
            key=(path, offset, element.name, shape),
            load=partial(blob.read, offset, element, shape),
            keep=element.bits < 8,
        )

    def _blob_path(self, file_name: str, name: str) -> Path:
        relative = Path(file_name.removeprefix("@model_path/"))
        if relative.is_absolute() or ".." in relative.parts:
            raise ArtifactError(f"constant {name} refers to {file_name!r}, outside the package", hint=_HINT)
        return self._directory / relative

    def _inline(self, message: Any, declared: TensorType, name: str) -> Array:
        kind = message.immediateValue.WhichOneof("value")
        if kind == "list":
            items = [
                self._inline(item, _tensor_type(item.type, name), name) for item in message.immediateValue.list.values
            ]
            return np.stack(items) if items else np.empty(0)
        if kind != "tensor":
            raise ArtifactError(f"constant {name} is stored as {kind}, which is not supported", hint=_HINT)
        tensor = message.immediateValue.tensor
        shape, element = _static_shape(declared, name), declared.element
        count = int(np.prod(shape, dtype=np.int64))
        field = tensor.WhichOneof("value")
        values: Any = getattr(tensor, field).values if field else ()
        try:
            if field != "bytes":
                return np.array(values, dtype=element.numpy).reshape(shape)
            if element.bits >= 8:
                return np.frombuffer(values, element.numpy).reshape(shape)
            signed = element.name.startswith("int")
            return unpack(np.frombuffer(values, np.uint8), count, element.bits, signed=signed).reshape(shape)
        except ValueError as error:
            raise ArtifactError(f"constant {name} does not fit {declared}: {error}", hint=_HINT) from error


def _tensor_type(message: Any, name: str) -> TensorType:
    kind = message.WhichOneof("type")
    if kind == "listType":
        return _tensor_type(message.listType.type, name)
    if kind != "tensorType" or message.tensorType.dataType not in BY_CODE:
        raise ArtifactError(f"{name} has a type that the executor does not support: {message}", hint=_HINT)
    tensor = message.tensorType
    shape: list[int | None] = []
    for dimension in tensor.dimensions:
        if dimension.WhichOneof("dimension") == "constant":
            shape.append(int(dimension.constant.size))
        elif dimension.unknown.variadic:
            return TensorType(BY_CODE[tensor.dataType], None)
        else:
            shape.append(None)
    return TensorType(BY_CODE[tensor.dataType], tuple(shape))


def _static_shape(declared: TensorType, name: str) -> tuple[int, ...]:
    shape = tuple(size for size in declared.shape or () if size is not None)
    if declared.shape is None or len(shape) != len(declared.shape):
        raise ArtifactError(f"constant {name} has no fixed shape: {declared}", hint=_HINT)
    return shape
