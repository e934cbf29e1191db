"""The executor's API: open a package, create sessions, predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.common.errors import ArtifactError, UsageError
from moec.targets.coreml.executor.constants import Constant, ConstantCache
from moec.targets.coreml.executor.counters import Counters
from moec.targets.coreml.executor.executor import Frame
from moec.targets.coreml.executor.graph import Function, GraphReader, cut
from moec.targets.coreml.executor.package import load_spec, model_file
from moec.targets.coreml.executor.plan import FunctionPlan, plan_function
from moec.targets.coreml.executor.state import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moec.targets.coreml.executor.dtypes import Array, TensorType


@dataclass(frozen=True, slots=True)
class TensorDescriptor:
    """An input, output or state of a function.

    Args:
        name: Its name.
        type: Element type and shape in the program; flexible dimensions are None.
        ranges: Minimum and maximum size of each dimension, if the model gives ranges; None: no maximum.
        shapes: The allowed shapes, if the model enumerates them.
    """

    name: str
    type: TensorType
    ranges: tuple[tuple[int, int | None], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether the model allows an array of `shape`."""
        if not self.type.admits(shape):
            return False
        if self.shapes:
            return shape in self.shapes
        return all(
            low <= size and (high is None or size <= high)
            for (low, high), size in zip(self.ranges, shape, strict=False)
        )

    def __str__(self) -> str:
        limits = f", one of {list(self.shapes)}" if self.shapes else ""
        limits = f", sizes within {list(self.ranges)}" if self.ranges else limits
        return f"{self.name}: {self.type}{limits}"


class MilModel:
    """A saved ML program that can be run on any machine.

    Args:
        spec: The parsed `Model` message.
        functions: Its functions by name.
        cache_bytes: Memory for unpacked and dequantized weights.
    """

    def __init__(self, spec: Any, functions: Mapping[str, Function], cache_bytes: int) -> None:
        self.spec = spec
        self._functions = dict(functions)
        self._plans: dict[str, FunctionPlan] = {}
        self._cache = ConstantCache(cache_bytes)

    @classmethod
    def open(cls, path: Path | str, *, cache_bytes: int = 4 << 30) -> MilModel:
        """Open an `.mlpackage`. Weights stay on disk until they are used.

        Args:
            path: The package directory.
            cache_bytes: Memory for unpacked and dequantized weights; the least recently used are dropped first.

        Raises:
            ArtifactError: Not an ML program package, or a damaged one.
            MissingExtraError: coremltools is not installed.
        """
        file = model_file(Path(path))
        spec = load_spec(file)
        reader = GraphReader(file.parent)
        functions = {name: reader.function(name, item) for name, item in spec.mlProgram.functions.items()}
        return cls(spec, functions, cache_bytes)

    def functions(self) -> tuple[str, ...]:
        """Names of the functions, sorted."""
        return tuple(sorted(self._functions))

    def default_function(self) -> str:
        """The function that runs when none is named.

        Raises:
            UsageError: The model has several functions and no default.
        """
        named = self.spec.description.defaultFunctionName or "main"
        if named in self._functions:
            return str(named)
        if len(self._functions) == 1:
            return next(iter(self._functions))
        raise UsageError("the model has no default function", hint=f"name one of {', '.join(self.functions())}")

    def inputs(self, function: str | None = None) -> tuple[TensorDescriptor, ...]:
        """Tensor inputs of `function` (default: the model's), states excluded.

        Raises:
            UsageError: No such function.
        """
        found = self._function(function)
        features = {item.name: item for item in self._description(found.name).input}
        return tuple(
            _descriptor(value.name, value.type, features.get(value.name))
            for value in found.inputs
            if not value.is_state
        )

    def states(self, function: str | None = None) -> tuple[TensorDescriptor, ...]:
        """States of `function`. Raises UsageError if there is no such function."""
        found = self._function(function)
        return tuple(TensorDescriptor(value.name, value.type) for value in found.inputs if value.is_state)

    def constants(self, function: str | None = None) -> Mapping[str, Constant]:
        """Constants of `function` by name, compressed weights both as stored parts and dequantized.

        Raises:
            UsageError: No such function.
            LoweringError: The function holds an op without a kernel.
        """
        return self.plan(function).constants

    def new_state(self) -> State:
        """States of all functions, zeroed. Functions share states of the same name.

        Raises:
            ArtifactError: Two functions declare different types for one name.
        """
        types: dict[str, TensorType] = {}
        for name in self.functions():
            for item in self.states(name):
                if types.setdefault(item.name, item.type) != item.type:
                    raise ArtifactError(
                        f"state {item.name} is {item.type} in function {name}, but {types[item.name]} in another",
                        hint="give the state the same type in both functions, or two names",
                    )
        return State(types)

    def function(self, name: str | None = None) -> Function:
        """The graph of a function (default: the model's). Raises UsageError if there is no such function."""
        return self._function(name)

    def session_of(self, plan: FunctionPlan, inputs: tuple[TensorDescriptor, ...], state: State) -> MilSession:
        """A session of a plan that the caller made, such as one with more outputs."""
        return MilSession(plan, inputs, state, self._cache)

    def session(self, function: str | None = None, *, state: State | None = None) -> MilSession:
        """A session of `function`.

        Args:
            function: Name; default is the model's default function.
            state: States to work on, as another session's `state`; default is new ones.

        Raises:
            UsageError: No such function.
            LoweringError: The function holds an op without a kernel.
        """
        plan = self.plan(function)
        return MilSession(
            plan, self.inputs(plan.function.name), self.new_state() if state is None else state, self._cache
        )

    def part(self, function: str, inputs: Sequence[str], output: str) -> MilSession:
        """A session of the part of `function` that computes `output` from `inputs`.

        Args:
            function: Name of the function.
            inputs: Values outside of branches, which the caller provides.
            output: A value outside of branches.

        Raises:
            UsageError: No such function.
            ArtifactError: The output depends on another input of the function.
        """
        part = cut(self._function(function), inputs, output)
        descriptors = tuple(TensorDescriptor(value.name, value.type) for value in part.inputs)
        return MilSession(plan_function(part), descriptors, State({}), self._cache)

    def plan(self, function: str | None = None) -> FunctionPlan:
        """The plan of `function`, made on first use.

        Raises:
            UsageError: No such function.
            LoweringError: The function holds an op without a kernel.
        """
        found = self._function(function)
        if found.name not in self._plans:
            self._plans[found.name] = plan_function(found)
        return self._plans[found.name]

    def _function(self, name: str | None) -> Function:
        name = self.default_function() if name is None else name
        if name not in self._functions:
            raise UsageError(f"the model has no function {name}", hint=f"its functions: {', '.join(self.functions())}")
        return self._functions[name]

    def _description(self, function: str) -> Any:
        for item in self.spec.description.functions:
            if item.name == function:
                return item
        return self.spec.description


class MilSession:
    """Runs one function; made by `MilModel.session`.

    Args:
        plan: The function.
        inputs: Its tensor inputs.
        state: States that it reads and writes.
        cache: Constants of the model.
    """

    def __init__(
        self,
        plan: FunctionPlan,
        inputs: tuple[TensorDescriptor, ...],
        state: State,
        cache: ConstantCache,
    ) -> None:
        self.plan = plan
        self.state = state
        self.counters = Counters()
        self.inputs = {item.name: item for item in inputs}
        self._cache = cache

    def predict(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Run the function once.

        Args:
            feeds: Array of each input, converted to the input's element type.

        Returns:
            Array of each output, of the type that the program declares.

        Raises:
            UsageError: An input is missing or unknown, or has a dtype or shape that the model does not allow.
            ArtifactError: The program is invalid.
        """
        arrays = self._checked(feeds)
        slots: list[Array | None] = [None] * self.plan.slots
        for name, slot in self.plan.inputs.items():
            slots[slot] = arrays[name]
        frame = Frame(self.plan, slots, self.state, self._cache, self.counters)
        # Infinity and NaN are valid results; the caller compares them.
        with np.errstate(all="ignore"):
            results = frame.run(self.plan.body)
        # Copy, since a result may be a view of a state, a weight or the caller's input.
        return {value.name: np.array(result) for value, result in zip(self.plan.outputs, results, strict=True)}

    def _checked(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        if feeds.keys() != self.inputs.keys():
            raise UsageError(
                f"function {self.plan.function.name} was given the inputs {sorted(feeds)}",
                hint=f"its inputs: {', '.join(str(item) for item in self.inputs.values())}",
            )
        return {name: _convert(descriptor, feeds[name]) for name, descriptor in self.inputs.items()}


def _convert(descriptor: TensorDescriptor, fed: Any) -> Array:
    array = np.asarray(fed)
    wanted = descriptor.type.element.numpy
    if not descriptor.admits(array.shape):
        raise UsageError(f"input {descriptor.name} was given shape {array.shape}", hint=f"expected: {descriptor}")
    if wanted.kind in "iub" and array.dtype.kind not in "iub":
        raise UsageError(f"input {descriptor.name} was given {array.dtype}", hint=f"expected: {descriptor}")
    with np.errstate(all="ignore"):
        converted = array.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(converted, array):
        raise UsageError(f"input {descriptor.name} holds values that {wanted} cannot", hint=f"expected: {descriptor}")
    return converted


def _descriptor(name: str, declared: TensorType, feature: Any) -> TensorDescriptor:
    """A descriptor of the program's type and the ranges or shapes in the model's description."""
    if feature is None or not feature.type.HasField("multiArrayType"):
        return TensorDescriptor(name, declared)
    array = feature.type.multiArrayType
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "shapeRange":
        ranges = tuple(
            (int(item.lowerBound), None if item.upperBound < 0 else int(item.upperBound))
            for item in array.shapeRange.sizeRanges
        )
        return TensorDescriptor(name, declared, ranges=ranges)
    if flexibility == "enumeratedShapes":
        shapes = tuple(tuple(int(d) for d in item.shape) for item in array.enumeratedShapes.shapes)
        return TensorDescriptor(name, declared, shapes=shapes)
    return TensorDescriptor(name, declared)
