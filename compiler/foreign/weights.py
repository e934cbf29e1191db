"""Where the checkpoint's weights are in a file of another exporter, found by their values.

Exporters fuse, split, transpose and interleave matrices, and name them as they like. But all of them keep the rows of a
matrix as they are: the vectors that are multiplied with an input. So rows of the checkpoint are searched among those of
the file by their cosine, which rounding to four bits leaves above 0.9; the rows of one matrix lie at a fixed distance
from each other.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.plan import TensorClass
from moec.quantize.tensor_classes import weight_roles
from moec.targets.model_files import StoredTensor

COSINE = 0.9
"""Smallest cosine of a row of the checkpoint and the same row in a file."""

SEARCH = 4e9
"""Products of values that one search without a fixed distance of the rows may take."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one matrix of the Program.

    Attributes:
        weight: Name of the weight.
        expert: Index in a stack, or None.
        start: First row.
        stop: Row after the last one.
    """

    weight: str
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece is in a file.

    Attributes:
        tensor: Index of the tensor in the order of names.
        axis: Its axis along which a row lies.
        rows: Index of each row, with all other axes flattened.
        slab: Index along the first axis of a stack of experts, or None.
    """

    tensor: int
    axis: int
    rows: np.ndarray
    slab: int | None


class FileRows:
    """The tensors of a file as rows.

    Args:
        tensors: The tensors of a file; those that cannot be read are left out.
    """

    def __init__(self, tensors: Sequence[StoredTensor]) -> None:
        readable = (tensor for tensor in tensors if tensor.read is not None and len(tensor.shape) > 1)
        self.tensors = sorted(readable, key=lambda tensor: _natural(tensor.name))
        self.matrix = lru_cache(maxsize=3)(self._matrix)

    def holding(self, width: int, count: int) -> list[tuple[int, int]]:
        """Tensor and axis of everything with at least `count` rows of length `width`."""
        return [
            (index, axis)
            for index, tensor in enumerate(self.tensors)
            for axis in reversed(range(len(tensor.shape)))
            if tensor.shape[axis] == width and np.prod(tensor.shape) >= count * width
        ]

    def _matrix(self, index: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a tensor along an axis, [R, K], and one over the length of each, [R, 1] (0 for zeros)."""
        tensor = self.tensors[index]
        assert tensor.read is not None
        try:
            values = tensor.read().reshape(tensor.shape)
        except (ValueError, IndexError, TypeError):  # codes in a layout that no reader knows: nothing is found in them
            values = np.zeros((0,) * len(tensor.shape), np.float32)
        rows = np.moveaxis(values, axis, -1).reshape(-1, max(values.shape[axis], 1))
        lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
        return rows, np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)

    def values(self, place: Place) -> np.ndarray:
        """The rows at `place`, [n, K] float32."""
        found: np.ndarray = self.matrix(place.tensor, place.axis)[0][place.rows]
        return found


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which "layer.10" comes after "layer.9"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: np.ndarray = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return unit


def pieces(program: Program) -> Iterator[tuple[Piece, TensorClass]]:
    """Every matrix of the Program; the two projections of a gate are pieces of their own."""
    for name, role in weight_roles(program).items():
        shape = program.weights[name].shape
        if role.tensor_class in (TensorClass.EXPERTS_GATE_UP, TensorClass.EXPERTS_DOWN):
            for expert in range(shape[0]):
                cut = shape[1] // 2 if role.tensor_class is TensorClass.EXPERTS_GATE_UP else shape[1]
                yield Piece(name, expert, 0, cut), role.tensor_class
                if cut < shape[1]:
                    yield Piece(name, expert, cut, shape[1]), role.tensor_class
        else:
            yield Piece(name, None, 0, shape[0]), role.tensor_class


@dataclass
class Located:
    """The result of a search.

    Attributes:
        places: Where each piece is.
        missing: Pieces that the file does not hold, as far as it can be read.
        left: Pieces that were not searched, since the time was up.
    """

    places: dict[Piece, Place] = field(default_factory=dict)
    missing: list[Piece] = field(default_factory=list)
    left: int = 0

    @property
    def understood(self) -> bool:
        """Whether all was searched and nothing is missing but experts of stacks whose other experts were found."""
        known = {piece.weight for piece in self.places}
        lost = all(piece.expert is not None and piece.weight in known for piece in self.missing)
        return lost and not self.left and len(self.missing) < len(self.places)


def locate(program: Program, held: FileRows, seconds: float = 120.0) -> Located:
    """Search every piece of `program` in a file, near the place of the piece before it first."""
    found, started = Located(), time.perf_counter()
    near: dict[tuple[str, int, int], int] = {}
    last = 0
    for piece, kind in pieces(program):
        if time.perf_counter() - started > seconds:
            found.left += 1
            continue
        rows = own_rows(program, piece)
        key = (kind.value, piece.start, rows.shape[-1])
        guess = near.get(key, last)
        order = sorted(held.holding(rows.shape[-1], len(rows)), key=lambda own, at=guess: abs(own[0] - at))  # type: ignore[misc]
        experts = None if piece.expert is None else program.weights[piece.weight].shape[0]
        place = next((got for index, axis in order if (got := _within(rows, held, index, axis, piece, experts))), None)
        if place is None:
            found.missing.append(piece)
            continue
        found.places[piece] = place
        near[key] = last = place.tensor
    return found


def own_rows(program: Program, piece: Piece) -> np.ndarray:
    """The checkpoint's values of a piece, [n, K] float32."""
    tensor = program.weights[piece.weight]
    if piece.expert is None:
        values = tensor.rows(piece.start, piece.stop)
    else:
        values = tensor.rows(piece.expert, piece.expert + 1)[0, piece.start : piece.stop]
    found: np.ndarray = values.float().numpy()
    return found


def _within(rows: np.ndarray, held: FileRows, index: int, axis: int, piece: Piece, experts: int | None) -> Place | None:
    """Where `rows` are in a tensor: in the part of the same expert if it is a stack, else anywhere."""
    (values, scales), tensor = held.matrix(index, axis), held.tensors[index]
    if values.shape[-1] != rows.shape[-1]:
        return None
    wanted = _unit(rows[[0, min(1, len(rows) - 1), -1]])
    stacked = experts is not None and len(tensor.shape) > 2 and tensor.shape[0] == experts and axis != 0
    size = len(values) // experts if stacked and experts else len(values)
    first = size * piece.expert if stacked and piece.expert is not None else 0
    for start, stop in dict.fromkeys(((first, first + size), (0, len(values)))):
        at = _at_distance((values[start:stop] @ wanted.T) * scales[start:stop], len(rows))
        if at is not None:
            slab = int((at[0] + start) // size) if stacked else None
            return Place(index, axis, at + start, slab)
    if experts is None and rows.size * len(values) <= SEARCH:
        at = _one_by_one((_unit(rows) @ values.T) * scales.T)
        return None if at is None else Place(index, axis, at, None)
    return None


def _at_distance(cosines: np.ndarray, count: int) -> np.ndarray | None:
    """Indices of `count` rows at a fixed distance; `cosines` [R, 3] are those of the first, second and last."""
    first, second = (int(cosines[:, column].argmax()) for column in (0, 1))
    step = max(second - first, 1)
    last = first + step * (count - 1)
    ends = cosines[first, 0], cosines[last, 2] if last < len(cosines) else 0.0
    return first + step * np.arange(count) if min(ends) > COSINE else None


def _one_by_one(cosines: np.ndarray) -> np.ndarray | None:
    """Indices of rows in any order, as where the halves of rotary heads are interleaved; `cosines` are [n, R]."""
    at: np.ndarray = cosines.argmax(-1)
    return at if cosines.max(-1).min() > COSINE and len(set(at.tolist())) == len(at) else None


@dataclass(frozen=True)
class FromFile(LazyTensor):
    """A weight of the Program with the values that a file holds; pieces that it lacks have the checkpoint's.

    Attributes:
        source: The checkpoint's weight.
        held: The file.
        places: Expert (0 for a matrix) and piece -> its place.
    """

    source: LazyTensor
    held: FileRows
    places: Mapping[int, Mapping[Piece, Place]]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the weight."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the weight."""
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Return a slice along axis 0."""
        if len(self.shape) == 2:
            return self._with(self.source.read(), 0)[start:stop]
        own = self.source.rows(start, stop)
        return torch.stack([self._with(own[index], start + index) for index in range(stop - start)])

    def _with(self, matrix: Tensor, expert: int) -> Tensor:
        changed = matrix.clone()
        for piece, place in self.places.get(expert, {}).items():
            changed[piece.start : piece.stop] = torch.from_numpy(self.held.values(place)).to(self.dtype)
        return changed


def with_values_of(program: Program, held: FileRows, found: Located) -> Program:
    """`program` with the file's values in every piece that was found."""
    by_weight: dict[str, dict[int, dict[Piece, Place]]] = {}
    for piece, place in found.places.items():
        by_weight.setdefault(piece.weight, {}).setdefault(piece.expert or 0, {})[piece] = place
    tensors: dict[str, LazyTensor] = {
        name: FromFile(program.weights[name], held, places) for name, places in by_weight.items()
    }
    return program.replace(weights=program.weights.with_tensors(tensors))
