"""Weights of an artifact in the form that its files hold, as a target reads them back. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Codes:
    """Matrices [..., N, K] as codes: weight = (code - zero point) * scale, or table[code] * scale.

    Attributes:
        bits: Bits of a code in the file.
        codes: Whole numbers, int8; with a table its indices, uint8: [..., N, K].
        scales: Positive numbers as the file has them, [..., N, G]; None where all are 1.
        block: Columns that share a scale; the last block of a row may be short. 0 without scales.
        zero_points: int8 [..., N, G]; None where all are 0. There are none without scales.
        table: Values of the codes, [..., T, 2 ** bits], each row of it for N / T rows; None where codes are numbers.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray | None = None
    block: int = 0
    zero_points: np.ndarray | None = None
    table: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """The matrices that the codes stand for, computed in float32."""
        values = self.codes.astype(np.float32) if self.table is None else self._looked_up(self.table)
        if self.scales is None:
            return values
        columns, whole = values.shape[-1], self.scales.shape[-1] * self.block
        if whole > columns:
            values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, whole - columns)])
        groups = values.reshape(*values.shape[:-1], -1, self.block)
        if self.zero_points is not None:
            groups -= self.zero_points[..., None]
        groups *= self.scales[..., None]
        return groups.reshape(values.shape)[..., :columns]

    def cut(self, start: int, stop: int) -> Codes:
        """The same of the rows [start, stop) of one matrix."""
        rows, table = slice(start, stop), self.table
        if table is not None:
            table = np.repeat(table, len(self.codes) // len(table), axis=0)[rows]
        scales, points = (None if part is None else part[rows] for part in (self.scales, self.zero_points))
        return Codes(self.bits, self.codes[rows], scales, self.block, points, table)

    def _looked_up(self, table: np.ndarray) -> np.ndarray:
        groups = self.codes.reshape(*table.shape[:-1], -1).astype(np.intp)
        values: np.ndarray = np.take_along_axis(table.astype(np.float32), groups, axis=-1)
        return values.reshape(self.codes.shape)


def stack(parts: Sequence[Codes | np.ndarray]) -> Codes | np.ndarray:
    """Matrices of one kind as a stack."""
    codes = [part for part in parts if isinstance(part, Codes)]
    if not codes:
        return np.stack([np.asarray(part) for part in parts])

    scales, points, table = (
        np.stack(found) if (found := [part for part in column if part is not None]) else None
        for column in zip(*((item.scales, item.zero_points, item.table) for item in codes), strict=True)
    )
    return Codes(codes[0].bits, np.stack([item.codes for item in codes]), scales, codes[0].block, points, table)


@dataclass(frozen=True)
class StoredWeight:
    """One weight of the final Program in an artifact, in the layout of the Program.

    Attributes:
        bits: Bits of its codes; None where it is stored as floats.
        rows: Reads the slice [start, stop) along axis 0, which for stacked experts are experts: `Codes`, or floats.
    """

    bits: int | None
    rows: Callable[[int, int], Codes | np.ndarray]

    def values(self, start: int, stop: int) -> np.ndarray:
        """The same slice as floats, dequantized."""
        found = self.rows(start, stop)
        return found.values() if isinstance(found, Codes) else found
