"""Kernels: pure numpy functions of an op's operands, with the counting of their costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moec.targets.coreml.executor.dtypes import Array

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Result: TypeAlias = Array | tuple[Array, ...]


@dataclass(frozen=True, slots=True)
class Args:
    """Operands of one op by parameter name.

    Args:
        values: Arrays of each parameter; more than one where the parameter is a tuple.
        opset: Version of the function's op set: 5 is iOS 15, 8 is iOS 18.
    """

    values: Mapping[str, tuple[Array, ...]]
    opset: int = 8

    def array(self, name: str) -> Array:
        """The operand `name`. Raises KeyError if the op lacks it."""
        return self.values[name][0]

    def arrays(self, name: str) -> tuple[Array, ...]:
        """All operands of the tuple parameter `name`. Raises KeyError if the op lacks it."""
        return self.values[name]

    def optional(self, name: str) -> Array | None:
        """The operand `name`, or None if the op lacks it."""
        present = self.values.get(name)
        return present[0] if present else None

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The 1-D operand `name` as integers, or None if the op lacks it."""
        present = self.optional(name)
        return None if present is None else tuple(int(v) for v in present.reshape(-1))

    def integer(self, name: str, default: int) -> int:
        """The scalar operand `name`, or `default` if the op lacks it."""
        present = self.optional(name)
        return default if present is None else int(present.reshape(()))

    def number(self, name: str, default: float) -> float:
        """The scalar operand `name`, or `default` if the op lacks it."""
        present = self.optional(name)
        return default if present is None else float(present.reshape(()))

    def flag(self, name: str, *, default: bool = False) -> bool:
        """The scalar operand `name`, or `default` if the op lacks it."""
        return bool(self.integer(name, int(default)))

    def text(self, name: str, default: str) -> str:
        """The string operand `name`, or `default` if the op lacks it."""
        present = self.optional(name)
        return default if present is None else str(present.reshape(()))


@dataclass(frozen=True, slots=True)
class Kernel:
    """How the executor runs one type of op.

    Args:
        run: Computes the results. It must not write to its operands. A ValueError, IndexError or
            KeyError means that the program is invalid.
        widen: Whether fp16 operands are widened to fp32. The executor rounds results to the declared type, so
            an op on fp16 is computed in fp32 and rounded once; data movement needs no widening.
        macs: Multiply-accumulates of one run, from its operands and its first result.
        partial: Operand from which the op reads only as many elements as its results hold.
    """

    run: Callable[[Args], Result]
    widen: bool = True
    macs: Callable[[Args, Array], int] | None = None
    partial: str | None = None


def axis_of(axis: int, rank: int) -> int:
    """A possibly negative `axis` as an index of a tensor of `rank`.

    Raises:
        ValueError: Out of range.
    """
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is out of range for rank {rank}")
    return axis % rank


def checked_indices(args: Args, indices: Array, size: int) -> Array:
    """Indices along a dimension of `size`, as non-negative int64.

    In Core ML, an index out of range has undefined results (`validate_indices` false) or is refused, and
    from iOS 17 on this includes negative ones: a program that uses one is wrong in either case.

    Raises:
        ValueError: An index is out of range.
    """
    lowest = 0 if args.opset >= 7 else -size
    wide = indices.astype(np.int64)
    if wide.size and (wide.min() < lowest or wide.max() >= size):
        raise ValueError(f"indices {wide.min()} to {wide.max()} exceed the dimension of size {size}")
    return np.where(wide < 0, wide + size, wide) if lowest < 0 else wide
