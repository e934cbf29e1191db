"""Plans a function: resolves names to slots, folds constants and finds the lifetimes of values.

This is done once per function. Nested blocks share the slots of their function, so that running a block
is a loop over a list of steps.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moec.compiler.common.errors import ArtifactError, LoweringError
from moec.targets.coreml.executor.constants import Constant
from moec.targets.coreml.executor.kernel import Args, Kernel
from moec.targets.coreml.executor.registry import CONSTEXPR_KERNELS, KERNELS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moec.targets.coreml.executor.dtypes import Array
    from moec.targets.coreml.executor.graph import Block, Function, Operation, Value

CONTROL_OPS = frozenset({"cond", "while_loop", "read_state", "write_state"})


@dataclass(frozen=True, slots=True)
class StateRef:
    """A state, by the name of the function's input."""

    name: str


Operand: TypeAlias = int | Constant | StateRef


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation, ready to run.

    Args:
        operation: The operation.
        path: Names of the enclosing control flow operations, then its own.
        kernel: Its kernel; None for control flow and states.
        operands: Slots, constants and states bound to each parameter.
        outputs: Slots that it fills.
        release: Slots that no later step reads.
        blocks: Nested blocks.
    """

    operation: Operation
    path: tuple[str, ...]
    kernel: Kernel | None
    operands: Mapping[str, tuple[Operand, ...]]
    outputs: tuple[int, ...]
    release: tuple[int, ...]
    blocks: tuple[BlockPlan, ...]

    def reads(self) -> Iterator[int]:
        """Slots that this step and its nested blocks read."""
        for operands in self.operands.values():
            yield from (operand for operand in operands if isinstance(operand, int))
        for block in self.blocks:
            for step in block.steps:
                yield from step.reads()
            yield from (operand for operand in block.outputs if isinstance(operand, int))


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """A block, ready to run.

    Args:
        inputs: Slots of its inputs.
        steps: Its steps, in order.
        outputs: Operands that it returns.
        release: Its own slots that are used only as outputs.
    """

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Operand, ...]
    release: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FunctionPlan:
    """A function, ready to run.

    Args:
        function: The function.
        body: Its body.
        inputs: Slot of each tensor input.
        slots: Number of slots that a run needs.
        constants: Every constant of the function and its nested blocks, by name.
        outputs: Name and type of each output.
    """

    function: Function
    body: BlockPlan
    inputs: Mapping[str, int]
    slots: int
    constants: Mapping[str, Constant]
    outputs: tuple[Value, ...]


def plan_function(function: Function) -> FunctionPlan:
    """Plan `function`.

    Raises:
        LoweringError: An op has no kernel.
        ArtifactError: A name is used before it is defined.
    """
    return _Planner(function).plan()


Scope: TypeAlias = ChainMap[str, Operand]


class _Planner:
    def __init__(self, function: Function) -> None:
        self._function = function
        self._slots = 0
        self._constants: dict[str, Constant] = {}
        self._types: dict[str, Value] = {value.name: value for value in function.inputs}

    def plan(self) -> FunctionPlan:
        scope: Scope = ChainMap({})
        inputs: dict[str, int] = {}
        for value in self._function.inputs:
            if value.is_state:
                scope[value.name] = StateRef(value.name)
            else:
                inputs[value.name] = scope[value.name] = self._slot()
        body = self._block(self._function.block, scope, ())
        outputs = tuple(self._types[name] for name in self._function.block.outputs)
        return FunctionPlan(self._function, body, inputs, self._slots, self._constants, outputs)

    def _slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _block(self, block: Block, scope: Scope, path: tuple[str, ...]) -> BlockPlan:
        inputs = []
        for value in block.inputs:
            self._types[value.name] = value
            inputs.append(self._slot())
            scope[value.name] = inputs[-1]
        steps = []
        for operation in block.operations:
            self._types.update((value.name, value) for value in operation.outputs)
            constant = self._folded(operation, scope)
            if constant is None:
                steps.append(self._step(operation, scope, path))
            else:
                scope[operation.outputs[0].name] = constant
                self._constants[constant.name] = constant
        where = f"a block of op {path[-1]}" if path else "the body"
        where = f"{where}, function {self._function.name}"
        outputs = tuple(self._lookup(name, scope, where) for name in block.outputs)
        return _with_lifetimes(tuple(inputs), steps, outputs)

    def _step(self, operation: Operation, scope: Scope, path: tuple[str, ...]) -> Step:
        kernel = KERNELS.get(operation.type)
        if kernel is None and operation.type not in CONTROL_OPS:
            raise LoweringError(
                f"no kernel for op {operation.type} ({self._where(operation)})",
                hint="moec's executor has no kernel for this op; Core ML itself runs on macOS only",
            )
        inner = (*path, operation.name)
        operands = self._operands(operation, scope)
        blocks = tuple(self._block(block, scope.new_child(), inner) for block in operation.blocks)
        outputs = []
        for value in operation.outputs:
            outputs.append(self._slot())
            scope[value.name] = outputs[-1]
        return Step(operation, inner, kernel, operands, tuple(outputs), (), blocks)

    def _operands(self, operation: Operation, scope: Scope) -> dict[str, tuple[Operand, ...]]:
        where = self._where(operation)
        return {
            key: tuple(self._lookup(item, scope, where) if isinstance(item, str) else item for item in items)
            for key, items in operation.inputs.items()
        }

    def _folded(self, operation: Operation, scope: Scope) -> Constant | None:
        """The constant of a `const` or `constexpr_*` operation; None for other operations."""
        if operation.type == "const":
            value = operation.inputs["val"][0]
            return value if isinstance(value, Constant) else None
        if not operation.type.startswith("constexpr_"):
            return None
        kernel = CONSTEXPR_KERNELS.get(operation.type)
        if kernel is None:
            raise LoweringError(
                f"no kernel for op {operation.type} ({self._where(operation)})",
                hint="moec's executor has no kernel for this op; Core ML itself runs on macOS only",
            )
        inputs = {
            key: tuple(item for item in items if isinstance(item, Constant))
            for key, items in self._operands(operation, scope).items()
        }
        return _derived(operation, kernel, inputs, self._where(operation))

    def _lookup(self, name: str, scope: Scope, where: str) -> Operand:
        if name not in scope:
            raise ArtifactError(
                f"{where} uses {name}, which is not defined before",
                hint="export the model again",
            )
        return scope[name]

    def _where(self, operation: Operation) -> str:
        return describe(self._function.name, operation)


def describe(function: str, operation: Operation) -> str:
    """An operation's name, output and function, for messages."""
    output = operation.outputs[0].name if operation.outputs else "none"
    return f"op {operation.name}, output {output}, function {function}"


def _derived(operation: Operation, kernel: Kernel, inputs: Mapping[str, tuple[Constant, ...]], where: str) -> Constant:
    result = operation.outputs[0]

    def exact() -> Array:
        values = {key: tuple(item.load() for item in items) for key, items in inputs.items()}
        if kernel.widen:
            values = {key: tuple(widen(item) for item in items) for key, items in values.items()}
        try:
            array = np.asarray(kernel.run(Args(values)))
        except (ValueError, IndexError, KeyError) as error:
            raise ArtifactError(f"{operation.type} failed ({where}): {error}", hint="export the model again") from error
        if not result.type.admits(array.shape):
            raise ArtifactError(
                f"{operation.type} yields shape {array.shape}, but {result.type} is declared ({where})",
                hint="export the model again",
            )
        return array

    def load() -> Array:
        return exact().astype(result.type.element.numpy, copy=False)

    items = [(key, item) for key in sorted(inputs) for item in inputs[key]]
    return Constant(
        name=result.name,
        type=result.type,
        stored_bytes=sum(item.stored_bytes for _, item in items),
        key=(operation.type, *((key, item.key) for key, item in items)),
        load=load,
        keep=True,
        exact=exact,
        parts=dict(items),
    )


def widen(array: Array) -> Array:
    """Widen fp16 to fp32; other types are unchanged."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _with_lifetimes(inputs: tuple[int, ...], steps: list[Step], outputs: tuple[Operand, ...]) -> BlockPlan:
    """Set for each step the slots of this block that it is the last to use."""
    own = {*inputs, *(slot for step in steps for slot in step.outputs)}
    yielded = {operand for operand in outputs if isinstance(operand, int)} & own
    alive = set(yielded)
    planned: list[Step] = []
    for step in reversed(steps):
        last = (({*step.reads(), *step.outputs}) & own) - alive
        alive |= last
        planned.append(
            Step(
                step.operation,
                step.path,
                step.kernel,
                step.operands,
                step.outputs,
                tuple(sorted(last)),
                step.blocks,
            )
        )
    return BlockPlan(inputs, tuple(reversed(planned)), outputs, tuple(sorted(yielded)))
