"""Element and tensor types of MIL, and how sub-byte elements are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class ElementType:
    """One element type of the ML program format.

    Args:
        name: MIL's spelling, which `cast` uses too.
        code: Number in `MIL.proto`'s `DataType`.
        blob_code: Number in the weight file's entry header, None where a weight file cannot hold it.
        bits: Stored width. Below 8 the elements are packed, least significant bits first.
        numpy: Type of the unpacked elements.
    """

    name: str
    code: int
    blob_code: int | None
    bits: int
    numpy: np.dtype[Any]


def _element(name: str, code: int, blob_code: int | None, bits: int, numpy: str) -> ElementType:
    return ElementType(name, code, blob_code, bits, np.dtype(numpy))


def _integers(kind: str, *rows: tuple[int, int, int | None]) -> tuple[ElementType, ...]:
    """Integer types, each in the narrowest numpy type that holds it. A row is (bits, code, blob code)."""
    return tuple(_element(f"{kind}{bits}", code, blob, bits, f"{kind}{max(bits, 8)}") for bits, code, blob in rows)


ELEMENT_TYPES = (
    _element("bool", 1, None, 8, "bool"),
    _element("string", 2, None, 0, "str"),
    _element("fp16", 10, 1, 16, "float16"),
    _element("fp32", 11, 2, 32, "float32"),
    _element("fp64", 12, None, 64, "float64"),
    *_integers("int", (8, 21, 4), (16, 22, 6), (32, 23, 14), (64, 24, None), (4, 25, 8)),
    *_integers("uint", (8, 31, 3), (16, 32, 7), (32, 33, 15), (64, 34, None)),
    *_integers("uint", (4, 35, 11), (2, 36, 10), (1, 37, 9), (6, 38, 13), (3, 39, 12)),
)
BY_CODE = {element.code: element for element in ELEMENT_TYPES}
BY_NAME = {element.name: element for element in ELEMENT_TYPES}


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape; a dimension that depends on the input is None.

    Args:
        element: Type of the elements.
        shape: Dimensions, or None where even the rank is unknown.
    """

    element: ElementType
    shape: tuple[int | None, ...] | None

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of `shape` agrees with every known dimension."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            declared is None or declared == actual for declared, actual in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        dims = "*" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.element.name}[{dims}]"


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` elements of `bits` bits occupy when packed."""
    return (count * bits + 7) // 8


def unpack(packed: Array, count: int, bits: int, *, signed: bool) -> Array:
    """Unpack sub-byte elements, least significant bits first.

    Args:
        packed: uint8[packed_bytes(count, bits)].
        count: Number of elements.
        bits: Width of an element, 1 to 8.
        signed: Read two's complement.

    Returns:
        int8[count] if `signed`, else uint8[count].

    Raises:
        ValueError: `packed` is too short.
    """
    if packed.size < packed_bytes(count, bits):
        raise ValueError(f"{packed.size} bytes hold fewer than {count} elements of {bits} bits")
    fields = np.unpackbits(packed, bitorder="little", count=count * bits).reshape(count, bits)
    values: Array = np.packbits(fields, axis=1, bitorder="little").reshape(count)
    if not signed:
        return values
    shift = 8 - bits
    return np.right_shift(np.left_shift(values, shift).view(np.int8), shift)
