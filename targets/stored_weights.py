"""Weights as a target reads them back from the files of an artifact. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Codes:
    """Quantized matrices [..., N, K]: weight = (code - zero point) * scale, or table[code] * scale.

    Attributes:
        bits: Bits per code in the file.
        codes: [..., N, K]: integers, int8; with a table, indices into it, uint8.
        scales: [..., N, G] in the dtype of the file; None where all are 1.
        block: Block size: columns that share a scale; the last block of a row may be shorter. 0 without scales.
        zero_points: int8 [..., N, G]; None where all are 0, and always without scales.
        table: Lookup table [..., T, 2 ** bits]; each of its rows serves N / T rows. None where codes are integers.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray | None = None
    block: int = 0
    zero_points: np.ndarray | None = None
    table: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """The dequantized matrices [..., N, K] float32."""
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
        """Rows [start, stop) of one matrix [N, K]."""
        rows, table = slice(start, stop), self.table
        if table is not None:
            table = np.repeat(table, len(self.codes) // len(table), axis=0)[rows]
        scales, zero_points = (None if part is None else part[rows] for part in (self.scales, self.zero_points))
        return Codes(self.bits, self.codes[rows], scales, self.block, zero_points, table)

    def _looked_up(self, table: np.ndarray) -> np.ndarray:
        groups = self.codes.reshape(*table.shape[:-1], -1).astype(np.intp)
        values: np.ndarray = np.take_along_axis(table.astype(np.float32), groups, axis=-1)
        return values.reshape(self.codes.shape)


def stack(parts: Sequence[Codes | np.ndarray]) -> Codes | np.ndarray:
    """Stack matrices of one kind, all `Codes` or all floats, along a new first axis."""
    codes = [part for part in parts if isinstance(part, Codes)]
    if not codes:
        return np.stack([np.asarray(part) for part in parts])

    scales, zero_points, table = (
        np.stack(found) if (found := [part for part in column if part is not None]) else None
        for column in zip(*((item.scales, item.zero_points, item.table) for item in codes), strict=True)
    )
    return Codes(codes[0].bits, np.stack([item.codes for item in codes]), scales, codes[0].block, zero_points, table)


@dataclass(frozen=True)
class StoredWeight:
    """One weight in an artifact, in the layout that it has in the final Program.

    Attributes:
        bits: Bits per code; None where the weight is stored as floats.
        rows: Reads the slice [start, stop) of axis 0 (experts, if the weight is a stack of them): `Codes` or floats.
    """

    bits: int | None
    rows: Callable[[int, int], Codes | np.ndarray]

    def values(self, start: int, stop: int) -> np.ndarray:
        """The slice [start, stop) of axis 0 as floats, dequantized."""
        found = self.rows(start, stop)
        return found.values() if isinstance(found, Codes) else found
