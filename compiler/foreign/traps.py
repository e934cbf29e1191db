"""Operators that a runtime reads otherwise than the file says: one row for each, with what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moec.targets.model_files import Operator

Value = str | int


@dataclass(frozen=True, slots=True)
class Trap:
    """An attribute that a runtime does not follow.

    Attributes:
        runtime: Start of the name of the runtime, such as "onnxruntime 1.32".
        device: Device on which it does so.
        operator: Type of the operator.
        attribute: Its attribute.
        default: Value of the attribute where an operator does not have it.
        followed: The values that the runtime follows. It accepts others without a word.
        read_as: What is computed for other values.
    """

    runtime: str
    device: str
    operator: str
    attribute: str
    default: Value
    followed: tuple[Value, ...]
    read_as: str


TRAPS: tuple[Trap, ...] = (
    # Measured on 1.32.0: fp4, nvfp4, mxfp4, wfp4afp8, fp8 and any other word give the bits that "int" gives.
    Trap("onnxruntime", "CPU", "QMoE", "quant_type", "int", ("int",), "the codes are read as integers"),
    # Measured on 1.31.1: 1 gives the bits that 0 gives.
    Trap("onnxruntime", "CPU", "MoE", "use_sparse_mixer", 0, (0,), "experts are weighted by a softmax"),
    # Measured on 1.31.1, microsoft/onnxruntime#33866: the kernel may run in place and clears its output first. 1.32.0
    # is right.
    Trap(
        "onnxruntime 1.31",
        "CPU",
        "MoE",
        "normalize_routing_weights",
        0,
        (1,),
        "zeros, if its input is used nowhere else",
    ),
)


@dataclass(frozen=True, slots=True)
class Caught:
    """A trap and the operators of a file that are in it."""

    trap: Trap
    value: Value
    operators: tuple[str, ...]

    def __str__(self) -> str:
        first, more = self.operators[0], len(self.operators) - 1
        where = f"{first} and {more} more" if more else first
        return f"{self.trap.operator} {where}: {self.trap.attribute} is {self.value}, but {self.trap.read_as}"


def caught(operators: Iterable[Operator], runtime: str, traps: Iterable[Trap] = TRAPS) -> list[Caught]:
    """The traps that `operators` are in.

    Args:
        operators: The operators of a file.
        runtime: The runtime that runs it, such as "onnxruntime 1.32.0, CPU".
        traps: The table.
    """
    known, found = list(operators), list[Caught]()
    for trap in traps:
        if not (runtime.startswith(trap.runtime) and trap.device in runtime):
            continue
        held: dict[Value, list[str]] = {}
        for operator in known:
            value = operator.attributes.get(trap.attribute, trap.default)
            if operator.kind == trap.operator and value not in trap.followed:
                held.setdefault(value, []).append(operator.name)
        found += [Caught(trap, value, tuple(names)) for value, names in held.items()]
    return found
