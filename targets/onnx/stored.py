"""Reads weights back from `model.onnx` and its data file, by the table that the lowering stored in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from moec.targets.onnx.files import model_path
from moec.targets.stored_weights import Codes, StoredWeight

TABLE = "moec.weights"
"""Metadata key of a table: name of a weight in the Program -> where the file holds its floats or codes.

Float weights: `initializer`, or `per_expert` with `{}` for the index of the expert; `transposed` and `interleaved`
describe how the layout differs from the Program's. Quantized weights: the initializers that hold `codes`, `scales` and
`zero_points` (or null); `first`, the row of these at which the weight begins; its `shape`, `bits` and `block`; whether
codes are `signed`; `interleaved`; `transposed`; and `rounded_by`, the kernel that rounds the activations of products
with the weight, or null. Names with `{}` for the index of the expert stand for the initializers of each.
"""


def stored_weights(directory: Path) -> Mapping[str, StoredWeight]:
    """The weights in the table of the model in `directory`, by name."""
    model = ir.load(model_path(directory))
    read = partial(_rows, model.graph.initializers)
    table: dict[str, dict[str, Any]] = json.loads(model.metadata_props[TABLE])
    return {name: (_coded if "codes" in entry else _float)(read, entry) for name, entry in table.items()}


def _rows(initializers: Mapping[str, ir.Value], name: str, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of an initializer, read without the others; 4-bit codes stay packed, two to a byte."""
    tensor = initializers[name].const_value
    assert tensor is not None
    shape = [int(size) for size in tensor.shape.numpy()]
    if not isinstance(tensor, ir.ExternalTensor):
        found: np.ndarray = tensor.numpy()[start:stop]
        return found
    kind = tensor.dtype
    packed = kind in {ir.DataType.INT4, ir.DataType.UINT4}
    dtype, width = (np.dtype(np.uint8), shape[-1] // 2) if packed else (kind.numpy(), shape[-1])
    data = np.memmap(tensor.path, dtype, "r", offset=tensor.offset or 0, shape=(*shape[:-1], width))
    return np.asarray(data[start:stop])


Read = Callable[[str, int, int], np.ndarray]
"""Name of an initializer, start and stop -> its rows."""


def _float(read: Read, entry: Mapping[str, Any]) -> StoredWeight:
    def rows(start: int, stop: int) -> np.ndarray:
        if "per_expert" in entry:
            value = np.stack([_whole(read, entry["per_expert"].format(index)) for index in range(start, stop)])
        else:
            value = read(entry["initializer"], start, stop)
        value = _deinterleaved(value) if entry.get("interleaved") else value
        return np.ascontiguousarray(value.swapaxes(-1, -2)) if entry["transposed"] else value

    return StoredWeight(None, rows)


def _whole(read: Read, name: str) -> np.ndarray:
    return read(name, 0, np.iinfo(np.int64).max)


def _deinterleaved(value: np.ndarray) -> np.ndarray:
    """Undo `interleave`: axis 1 of [n, 2I, ...] holds all of gate, then all of up."""
    return np.concatenate([value[:, 0::2], value[:, 1::2]], axis=1)


def _coded(read: Read, entry: Mapping[str, Any]) -> StoredWeight:
    if entry.get("transposed"):
        return _coded_transposed(read, entry)
    first, shape, bits, block = entry["first"], entry["shape"], entry["bits"], entry["block"]

    def part(name: str, start: int, stop: int) -> np.ndarray:
        if "{}" in entry[name]:
            each = [_whole(read, entry[name].format(index)) for index in range(start, stop)]
            return np.stack(each).reshape(stop - start, *shape[1:-1], -1)
        value = read(entry[name], first + start, first + stop).reshape(stop - start, *shape[1:-1], -1)
        return _deinterleaved(value) if entry["interleaved"] else value

    def numbers(name: str, start: int, stop: int, width: int) -> np.ndarray:
        return _unpacked(part(name, start, stop), bits, entry["signed"])[..., :width]

    def rows(start: int, stop: int) -> Codes:
        groups = -(-shape[-1] // block)
        zero_points = None if entry["zero_points"] is None else numbers("zero_points", start, stop, groups)
        return Codes(bits, numbers("codes", start, stop, shape[-1]), part("scales", start, stop), block, zero_points)

    return StoredWeight(bits, rows)


def _coded_transposed(read: Read, entry: Mapping[str, Any]) -> StoredWeight:
    """Codes [K, N] and scales [G, N], one initializer for each expert where the weight is a stack."""
    first, shape, bits, block = entry["first"], entry["shape"], entry["bits"], entry["block"]

    def part(name: str, start: int, stop: int) -> np.ndarray:
        if len(shape) == 3:
            return np.stack([matrix(name, index, 0, shape[1]) for index in range(start, stop)])
        return matrix(name, 0, first + start, first + stop)

    def matrix(name: str, index: int, start: int, stop: int) -> np.ndarray:
        value = _whole(read, entry[name].format(index))
        value = _unpacked(value, bits, signed=True) if name == "codes" else value
        return np.ascontiguousarray(value.T[start:stop])

    def rows(start: int, stop: int) -> Codes:
        return Codes(bits, part("codes", start, stop), part("scales", start, stop), block, None)

    return StoredWeight(bits, rows)


_HALVES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1)
_PAIRS = {
    signed: np.ascontiguousarray(((_HALVES ^ 8) if signed else _HALVES) - 8, np.int8).view(np.int16)[:, 0]
    for signed in (True, False)
}
"""The two codes of each byte, lower nibble first, as one int16: for signed codes, and for codes stored plus 8."""


def _unpacked(value: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Signed codes, int8."""
    if bits == 4 and value.dtype == np.uint8:
        return _PAIRS[signed].take(value).view(np.int8)
    return value.view(np.int8) if signed else (value - 128).view(np.int8)
