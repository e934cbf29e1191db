"""Constants of a program: read lazily, dequantized once, kept within a memory limit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from moec.targets.coreml.executor.dtypes import Array, TensorType


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A value known before the program runs.

    Args:
        name: Name in the program.
        type: Declared type.
        stored_bytes: Bytes in the weight file that are read for the whole value; for a quantized weight,
            those of its data, scales and offsets or table. 0 for a value inlined in the program.
        key: Equal for constants that yield the same value, across functions too.
        load: Computes the value.
        keep: Whether recomputing it is expensive enough for the cache to hold it.
        exact: Computes it without rounding to its type, if it is computed from stored parts.
        parts: These parts by the op's parameter names.
    """

    name: str
    type: TensorType
    stored_bytes: int
    key: Hashable
    load: Callable[[], Array] = field(repr=False)
    keep: bool
    exact: Callable[[], Array] | None = field(default=None, repr=False)
    parts: Mapping[str, Constant] = field(default_factory=dict, repr=False)


class ConstantCache:
    """Least recently used cache of unpacked, dequantized and widened constants.

    Args:
        limit_bytes: Memory that the held arrays may take.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._arrays: OrderedDict[Hashable, Array] = OrderedDict()

    def value(self, constant: Constant) -> Array:
        """The value in its declared type."""
        if not constant.keep:
            return constant.load()
        return self._lookup(constant.key, constant.load)

    def widened(self, constant: Constant) -> Array:
        """The value, with fp16 widened to fp32; other types unchanged."""
        if constant.type.element.name != "fp16":
            return self.value(constant)
        return self._lookup((constant.key, "fp32"), lambda: self.value(constant).astype(np.float32))

    def _lookup(self, key: Hashable, produce: Callable[[], Array]) -> Array:
        held = self._arrays.get(key)
        if held is not None:
            self._arrays.move_to_end(key)
            return held
        array = produce()
        if array.nbytes <= self.limit_bytes:
            self._arrays[key] = array
            self.held_bytes += array.nbytes
            while self.held_bytes > self.limit_bytes:
                _, evicted = self._arrays.popitem(last=False)
                self.held_bytes -= evicted.nbytes
        return array
