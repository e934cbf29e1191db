"""Control flow and states: ops that run nested blocks, and ops that read or write states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor.plan import StateRef, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.targets.coreml.executor.dtypes import Array
    from moec.targets.coreml.executor.executor import Frame


def _cond(step: Step, frame: Frame) -> tuple[Array, ...]:
    """Run one branch; the MACs and weights of the other do not count."""
    taken = bool(frame.value(step.operands["pred"][0]).reshape(()))
    return frame.run(step.blocks[0 if taken else 1])


def _while_loop(step: Step, frame: Frame) -> tuple[Array, ...]:
    condition, body = step.blocks
    values = tuple(frame.value(operand) for operand in step.operands["loop_vars"])
    while bool(frame.run(condition, values)[0].reshape(())):
        values = frame.run(body, values)
    return values


def _state_name(step: Step) -> str:
    operand = step.operands["input"][0]
    if not isinstance(operand, StateRef):
        raise ArtifactError(
            f"{step.operation.name} needs a state, but its operand is a tensor", hint="export the model again"
        )
    return operand.name


def _read_state(step: Step, frame: Frame) -> tuple[Array, ...]:
    return (frame.state.read(_state_name(step)),)


def _write_state(step: Step, frame: Frame) -> tuple[Array, ...]:
    frame.state.write(_state_name(step), frame.value(step.operands["data"][0]))
    return ()


CONTROL: dict[str, Callable[[Step, Frame], tuple[Array, ...]]] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "read_state": _read_state,
    "write_state": _write_state,
}
