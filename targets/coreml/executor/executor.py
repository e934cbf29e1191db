"""Runs a planned function step by step, rounding each result to its declared type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor.constants import Constant, ConstantCache
from moec.targets.coreml.executor.control import CONTROL
from moec.targets.coreml.executor.counters import Cost, Counters
from moec.targets.coreml.executor.kernel import Args, Kernel
from moec.targets.coreml.executor.plan import BlockPlan, FunctionPlan, Operand, StateRef, Step, describe, widen

if TYPE_CHECKING:
    from moec.targets.coreml.executor.dtypes import Array
    from moec.targets.coreml.executor.state import State


@dataclass(slots=True)
class Frame:
    """One run of a function.

    Args:
        plan: The function.
        slots: Values by slot; None before they are computed and after their last use.
        state: The states that the function reads and writes.
        cache: The constants of the model.
        counters: The costs that the run adds to.
    """

    plan: FunctionPlan
    slots: list[Array | None]
    state: State
    cache: ConstantCache
    counters: Counters

    def value(self, operand: Operand, *, widened: bool = False) -> Array:
        """Value of an operand; with `widened`, fp16 as fp32."""
        if isinstance(operand, Constant):
            return self.cache.widened(operand) if widened else self.cache.value(operand)
        if isinstance(operand, StateRef):
            raise ArtifactError(f"state {operand.name} is used as a tensor", hint="export the model again")
        array = self.slots[operand]
        if array is None:
            raise ValueError("an operand was released before its last use")
        return widen(array) if widened else array

    def run(self, block: BlockPlan, arguments: tuple[Array, ...] = ()) -> tuple[Array, ...]:
        """Run a block on `arguments` and return what it yields."""
        for slot, argument in zip(block.inputs, arguments, strict=True):
            self.slots[slot] = argument
        for step in block.steps:
            self._run_step(step)
            for slot in step.release:
                self.slots[slot] = None
        results = tuple(self.value(operand) for operand in block.outputs)
        for slot in block.release:
            self.slots[slot] = None
        return results

    def _run_step(self, step: Step) -> None:
        try:
            if step.kernel is None:
                results = CONTROL[step.operation.type](step, self)
                cost = Cost()
            else:
                results, cost = self._compute(step, step.kernel)
            self._store(step, results)
        except (ValueError, IndexError, KeyError) as error:
            where = describe(self.plan.function.name, step.operation)
            raise ArtifactError(
                f"{step.operation.type} failed ({where}): {error}",
                hint="the program is invalid, or the values of its inputs are",
            ) from error
        self.counters.add(step.path, cost)

    def _compute(self, step: Step, kernel: Kernel) -> tuple[tuple[Array, ...], Cost]:
        values = {
            key: tuple(self.value(operand, widened=kernel.widen) for operand in operands)
            for key, operands in step.operands.items()
        }
        args = Args(values, self.plan.function.opset)
        result = kernel.run(args)
        results = result if isinstance(result, tuple) else (np.asarray(result),)
        macs = kernel.macs(args, results[0]) if kernel.macs else 0
        return results, Cost(macs, _weight_bytes(step, kernel, results))

    def _store(self, step: Step, results: tuple[Array, ...]) -> None:
        outputs = step.operation.outputs
        if len(results) != len(outputs):
            raise ValueError(f"{len(results)} results for {len(outputs)} outputs")
        for slot, output, result in zip(step.outputs, outputs, results, strict=True):
            if not output.type.admits(result.shape):
                raise ValueError(f"the result has shape {result.shape}, but {output.type} is declared")
            self.slots[slot] = result.astype(output.type.element.numpy, copy=False)


def _weight_bytes(step: Step, kernel: Kernel, results: tuple[Array, ...]) -> int:
    """Stored bytes of the constants that the step read."""
    total = 0
    for key, operands in step.operands.items():
        for operand in operands:
            if not isinstance(operand, Constant) or not operand.stored_bytes:
                continue
            size = int(np.prod([d for d in operand.type.shape or () if d is not None], dtype=np.int64))
            if key == kernel.partial and size:
                total += operand.stored_bytes * sum(result.size for result in results) // size
            else:
                total += operand.stored_bytes
    return total
