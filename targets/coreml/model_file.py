"""Core ML packages of coremltools and others, run by moec's executor or, on macOS, described by it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moec.targets.coreml.executor import MilModel, TensorDescriptor
from moec.targets.coreml.executor.model import MilSession
from moec.targets.coreml.executor.plan import plan_function
from moec.targets.model_files import Feeds, FileFormat, ModelFile, Operator, Port, Product, StoredTensor

if TYPE_CHECKING:
    from moec.targets.coreml.executor.constants import Constant
    from moec.targets.coreml.executor.graph import Block, Function, Operation
    from moec.targets.coreml.executor.state import State

_PRODUCTS = frozenset({"linear", "matmul", "conv"})
_PRODUCER = "com.github.apple.coremltools.version"
"""Key under which coremltools writes its version into the metadata of a model."""


def is_package(path: Path, head: bytes) -> bool:  # noqa: ARG001
    """Whether a directory is an `.mlpackage`."""
    return path.is_dir() and (path / "Manifest.json").is_file() and (path / "Data").is_dir()


FORMAT: FileFormat[ModelFile] = FileFormat(
    "Core ML",
    "a package with Manifest.json and Data",
    is_package,
    lambda path: CoremlFile(path),
    ("coremltools", "coreml"),
)


class CoremlFile:
    """A package; see `moec.targets.model_files.ModelFile`.

    Args:
        path: The `.mlpackage`.

    Raises:
        ArtifactError: It is damaged, or no ML program.
    """

    runtime = "moec's executor for ML programs, CPU"
    stands_in = "moec's executor for Core ML"

    def __init__(self, path: Path) -> None:
        self._model = MilModel.open(path)
        self._function = self._model.function()
        version = self._model.spec.description.metadata.userDefined.get(_PRODUCER, "")
        self.producer = f"coremltools {version}" if version else ""
        self.inputs = tuple(_port(own) for own in self._model.inputs())
        types = {value.name: value.type for _, own in _operations(self._function.block) for value in own.outputs}
        self.outputs = tuple(
            Port(name, types[name].shape or (), np.dtype(types[name].element.numpy))
            for name in self._function.block.outputs
        )
        self.states = len(self._model.states())
        results = Counter(
            value.type.element.name
            for _, own in _operations(self._function.block)
            if own.type in _PRODUCTS
            for value in own.outputs
        )
        self.float_precision = "fp16" if results["fp16"] > results["fp32"] else "fp32"
        self.top_k = tuple(
            (own.outputs[1].name, str(own.inputs["x"][0]))
            for own in self._function.block.operations
            if own.type == "topk"
        )

    def session(self, also: Sequence[str] = ()) -> CoremlSession:
        """A session with states of its own; see `ModelFile.session`."""
        block = replace(self._function.block, outputs=(*self._function.block.outputs, *also))
        return CoremlSession(self._model, replace(self._function, block=block))

    def tensors(self) -> Sequence[StoredTensor]:
        """The constants that are in the weight file, each once."""
        found = {own.key: own for own in self._model.constants().values() if own.stored_bytes and _is_float(own)}
        inner = {part.key for own in found.values() for part in _parts(own)}
        return tuple(_stored(own) for key, own in found.items() if key not in inner)

    def operators(self) -> Sequence[Operator]:
        """The operations, those in branches and loops included."""
        return tuple(Operator(own.type, own.name, branch=inner) for inner, own in _operations(self._function.block))


class CoremlSession:
    """Runs a function; see `moec.targets.model_files.FileSession`.

    Args:
        model: The package.
        function: Its function, perhaps with more outputs.
    """

    def __init__(self, model: MilModel, function: Function) -> None:
        self._function = function
        self._state: State = model.new_state()
        self._session: MilSession = model.session_of(plan_function(function), model.inputs(), self._state)

    def reset(self) -> None:
        """Set every state to zero."""
        self._state.reset()

    def run(self, feeds: Feeds) -> Mapping[str, np.ndarray]:
        """All inputs -> all outputs."""
        return self._session.predict(feeds)

    def products(self) -> Sequence[Product]:
        """The products so far, from the executor's counts of multiplications and the declared widths."""
        named = {own.name: own for _, own in _operations(self._function.block) if own.type in _PRODUCTS}
        widths = {name: _widths(own, self._shapes()) for name, own in named.items()}
        found = []
        for name, (inner, outer) in widths.items():
            if macs := self._session.counters.total_of(name).macs:
                found.append(Product(macs // max(1, inner * outer), inner, outer))
        return found

    def _shapes(self) -> Mapping[str, tuple[int | None, ...]]:
        values = [value for _, own in _operations(self._function.block) for value in own.outputs]
        return {value.name: value.type.shape or () for value in (*self._function.inputs, *values)}


def _operations(block: Block, inner: bool = False) -> Iterator[tuple[bool, Operation]]:
    """Every operation, and whether it is in a branch or loop."""
    for own in block.operations:
        yield inner, own
        for nested in own.blocks:
            yield from _operations(nested, True)


def _widths(own: Operation, shapes: Mapping[str, tuple[int | None, ...]]) -> tuple[int, int]:
    """Inner and outer width of a product, 0 where it depends on the input."""
    operand, result = own.inputs["x"][0], own.outputs[0].type.shape or ()
    given = shapes[operand] if isinstance(operand, str) else operand.type.shape or ()
    if not given or not result:
        return 0, 0
    inner, outer = (given[1], result[1]) if own.type == "conv" else (given[-1], result[-1])
    if outer == 1 and len(result) > 1:  # a matrix of weights times a column
        outer = result[-2]
    return inner or 0, outer or 0


def _port(own: TensorDescriptor) -> Port:
    shape = own.type.shape or ()
    longest: tuple[int | None, ...] | None = None
    if own.shapes:  # the largest of the shapes that the model enumerates, to which shorter sequences are filled up
        largest = max(own.shapes, key=math.prod)
        shape = largest
    elif own.ranges:
        longest = tuple(high for _, high in own.ranges)
        shape = tuple(None if low != high else low for low, high in own.ranges)
    return Port(own.name, shape, np.dtype(own.type.element.numpy), longest)


def _parts(constant: Constant) -> Iterator[Constant]:
    for part in constant.parts.values():
        yield part
        yield from _parts(part)


def _stored(constant: Constant) -> StoredTensor:
    shape = tuple(int(size) for size in constant.type.shape or () if size is not None)
    read = constant.exact or constant.load
    if not constant.parts:
        element = constant.type.element
        return StoredTensor(constant.name, shape, element.name, element.bits, constant.stored_bytes, read=_floats(read))
    held = list(_parts(constant))
    codes = max((part for part in held if not part.parts), key=_values)
    bits, table = codes.type.element.bits, any("lut" in own.parts for own in (constant, *held))
    scales = next((own.parts["scale"] for own in (constant, *held) if "scale" in own.parts), None)
    block = None
    if scales is not None and scales.type.shape and (last := scales.type.shape[-1]) and last > 1:
        block = shape[-1] // last
    kind = f"palette of {1 << bits}" if table else f"int{bits}"
    precision = kind if block is None else f"{kind}, block {block}"
    return StoredTensor(constant.name, shape, precision, bits, constant.stored_bytes, block, _floats(read))


def _is_float(constant: Constant) -> bool:
    """Whether its values are floats, perhaps stored as codes."""
    return constant.type.element.name.startswith("fp")


def _values(constant: Constant) -> int:
    return math.prod(size or 1 for size in constant.type.shape or ())


def _floats(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        return np.asarray(read(), np.float32)

    return values
