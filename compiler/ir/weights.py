"""Lazy tensors, and the WeightStore of named lazy tensors.

Values are read only when `read` or `rows` is called, and are not kept. `rows` reads a slice along axis 0, which for
stacked experts is one expert, so a whole stack need never be in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError
from moec.compiler.ir.safetensors_file import StoredEntry

Leaf = Callable[["LazyTensor"], "LazyTensor | None"]
"""Replacement for a source tensor in `LazyTensor.map_sources`; None if there is none."""


class LazyTensor(ABC):
    """A tensor whose shape and dtype are known and whose values are made on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Return the slice [start, stop) along axis 0, or the whole tensor if it is a scalar.

        Raises:
            CheckpointError: A file is damaged, or holds NaN or infinity.
        """

    def read(self) -> Tensor:
        """Return the whole tensor."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def chunks(self, limit: int = 1 << 23) -> Iterator[Tensor]:
        """Yield the tensor in slices along axis 0 of about `limit` bytes, but at least one row."""
        if not self.shape or self.nbytes <= limit:
            yield self.read()
            return
        step = max(1, limit * self.shape[0] // self.nbytes)
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0]))

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """This tensor in `dtype`."""
        if dtype == self.dtype:
            return self
        return Cast(self, dtype)

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """This tensor with each of its source tensors replaced by `leaf` of it, and casts left out.

        So the codes of a quantized tensor can follow their weight through stacking, joining and transposing. None if
        values are computed and not only moved, or if `leaf` returns None.
        """
        return leaf(self)


class Converted(LazyTensor):
    """A tensor of the shape of `source` with other values or another dtype."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the source."""
        return self.source.shape


@dataclass(frozen=True)
class Cast(Converted):
    """`source` in another dtype."""

    source: LazyTensor
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Cast the same rows of the source."""
        return self.source.rows(start, stop).to(self.dtype)

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`; the cast is left out."""
        return self.source.map_sources(leaf)


@dataclass(frozen=True)
class Stored(LazyTensor):
    """A tensor of a safetensors file."""

    entry: StoredEntry
    _checked: set[tuple[int, int]] = field(default_factory=set, repr=False, compare=False)
    """Slices that were read before, from a file that must not change: their values are finite."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape in the file."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype in the file."""
        return self.entry.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Read a slice.

        Raises:
            CheckpointError: The file is damaged, or the values hold NaN or infinity.
        """
        value = self.entry.rows(start, stop)
        if (start, stop) not in self._checked:
            _check_finite(value, self.entry)
            self._checked.add((start, stop))
        return value


def _check_finite(value: Tensor, entry: StoredEntry) -> None:
    if not value.is_floating_point() or not value.numel():
        return
    if value.dtype.itemsize == 1:
        value = value.to(torch.float32)  # aminmax does not support fp8
    # Extremes show every NaN and infinity without a temporary of the size of the tensor.
    low, high = value.aminmax()
    if not (low.isfinite() and high.isfinite()):
        bad = int((~value.isfinite()).sum())
        raise CheckpointError(
            f"{entry.source.path}: tensor {entry.name} holds NaN or infinity ({bad} of {value.numel()} values read)",
            hint="the checkpoint is damaged, or was cast to a dtype too narrow for it",
        )


@dataclass(frozen=True)
class Constant(LazyTensor):
    """A small tensor that is held in memory, such as a rotary table or a constant of the trace."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the value."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the value."""
        return self.value.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Return a slice of the value."""
        return self.value[start:stop] if self.value.ndim else self.value


@dataclass(frozen=True)
class Mapped(LazyTensor):
    """`function` of another tensor, row by row: it must keep axis 0 and treat each index of it independently.

    `moves` means that the function only moves values.
    """

    source: LazyTensor
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    moves: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        """Map the same rows of the source."""
        return self.function(self.source.rows(start, stop))

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`."""
        source = self.source.map_sources(leaf) if self.moves else None
        return None if source is None else Mapped(source, self.function, self.shape, source.dtype, moves=True)


@dataclass(frozen=True)
class Computed(LazyTensor):
    """A function of whole tensors; `moves` as for `Mapped`."""

    sources: tuple[LazyTensor, ...]
    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    moves: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        """Compute, then slice."""
        value = self.read()
        return value[start:stop] if value.ndim else value

    def read(self) -> Tensor:
        """Compute."""
        return self.function(*(source.read() for source in self.sources))

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`."""
        sources = map_all_sources(self.sources, leaf) if self.moves else None
        return None if sources is None else Computed(sources, self.function, self.shape, sources[0].dtype, moves=True)


@dataclass(frozen=True)
class Concatenated(LazyTensor):
    """Several tensors joined along an axis."""

    sources: tuple[LazyTensor, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The joined shape."""
        shape = list(self.sources[0].shape)
        shape[self.axis] = sum(source.shape[self.axis] for source in self.sources)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the first; all are alike."""
        return self.sources[0].dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Join the rows that are in the slice."""
        if self.axis:
            return torch.cat([source.rows(start, stop) for source in self.sources], self.axis)
        pieces, offset = [], 0
        for source in self.sources:
            low, high = max(start - offset, 0), min(stop - offset, source.shape[0])
            if low < high:
                pieces.append(source.rows(low, high))
            offset += source.shape[0]
        return torch.cat(pieces)

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`."""
        sources = map_all_sources(self.sources, leaf)
        return None if sources is None else Concatenated(sources, self.axis)


def map_all_sources(sources: Sequence[LazyTensor], leaf: Leaf) -> tuple[LazyTensor, ...] | None:
    """`LazyTensor.map_sources` of each of `sources`; None if it is None for any of them."""
    found = [source.map_sources(leaf) for source in sources]
    return tuple(item for item in found if item is not None) if None not in found else None


def concatenate(sources: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Join tensors along `axis`; a single tensor is returned unchanged."""
    return sources[0] if len(sources) == 1 else Concatenated(tuple(sources), axis)


def swap_last(source: LazyTensor) -> LazyTensor:
    """Swap the last two axes, reading [E, N, K] row by row and [N, K] as a whole; swapping twice is undone."""
    if isinstance(source, Swapped):
        return source.source
    if isinstance(source, Cast) and isinstance(source.source, Swapped):
        return source.source.source.cast(source.dtype)
    return Swapped(source)


@dataclass(frozen=True)
class Swapped(LazyTensor):
    """`source` with its last two axes swapped; made by `swap_last`."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The swapped shape."""
        return (*self.source.shape[:-2], self.source.shape[-1], self.source.shape[-2])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the source."""
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Swap the same rows of a stack; a matrix is read as a whole."""
        if len(self.shape) > 2:
            return self.source.rows(start, stop).transpose(-1, -2).contiguous()
        return self.source.read().T[start:stop].contiguous()

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`."""
        source = self.source.map_sources(leaf)
        return None if source is None else swap_last(source)


class WeightStore(Mapping[str, LazyTensor]):
    """Named lazy tensors. Tied weights are stored once; their other names are aliases."""

    def __init__(self, tensors: Mapping[str, LazyTensor], aliases: Mapping[str, str] | None = None) -> None:
        self._tensors = dict(tensors)
        self._aliases = dict(aliases or {})

    def __getitem__(self, name: str) -> LazyTensor:
        """The tensor called `name`, or the one that it is tied to."""
        return self._tensors[self.resolve(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def resolve(self, name: str) -> str:
        """The name under which a weight is stored, which differs for an alias."""
        return self._aliases.get(name, name)

    def read(self, name: str) -> Tensor:
        """Values of the tensor called `name`."""
        return self[name].read()

    def with_tensors(self, tensors: Mapping[str, LazyTensor]) -> WeightStore:
        """A store that also holds `tensors`."""
        return WeightStore({**self._tensors, **tensors}, self._aliases)

    def only(self, names: Iterable[str]) -> WeightStore:
        """A store with only the tensors called `names`, and their aliases."""
        kept = {self.resolve(name) for name in names}
        return WeightStore(
            {name: tensor for name, tensor in self._tensors.items() if name in kept},
            {alias: name for alias, name in self._aliases.items() if name in kept},
        )
