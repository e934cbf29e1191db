"""Lazy tensors, and the WeightStore that names them.

Nothing here is read before `read` or `rows` is called, and nothing is kept afterwards. `rows` gives a slice along
axis 0, which for stacked experts is one expert, so that a whole stack need never be in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moec.compiler.errors import CheckpointError, first_line
from moec.compiler.frontend.checkpoint import StoredEntry


class LazyTensor(ABC):
    """A tensor whose shape and dtype are known and whose values are made on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Return the slice [start, stop) along axis 0 (the tensor itself where it has no axis)."""

    def read(self) -> Tensor:
        """Return the whole tensor."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def chunks(self, limit: int = 1 << 25) -> Iterator[Tensor]:
        """Yield the tensor in slices along axis 0 of about `limit` bytes each, at least one row."""
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
        return Mapped(self, lambda value: value.to(dtype), self.shape, dtype)


@lru_cache(maxsize=64)
def _handle(path: str) -> Any:
    return safe_open(path, framework="pt")


@dataclass(frozen=True)
class Stored(LazyTensor):
    """A tensor of a safetensors file."""

    entry: StoredEntry

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
        try:
            handle = _handle(str(self.entry.file))
            if not self.shape:
                value: Tensor = handle.get_tensor(self.entry.name)
            else:
                value = handle.get_slice(self.entry.name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.entry.file}: tensor {self.entry.name} cannot be read: {first_line(error)}",
                hint="download the file again",
            ) from error
        _check_finite(value, self.entry)
        return value


def _check_finite(value: Tensor, entry: StoredEntry) -> None:
    if not value.is_floating_point() or not value.numel():
        return
    # The extremes carry every NaN and infinity, and need no temporary as large as the tensor.
    low, high = value.aminmax()
    if not (low.isfinite() and high.isfinite()):
        bad = int((~value.isfinite()).sum())
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} holds NaN or infinity ({bad} of {value.numel()} values read)",
            hint="the checkpoint is damaged, or was cast to a dtype too narrow for it",
        )


@dataclass(frozen=True)
class Constant(LazyTensor):
    """A small tensor that is held in memory: rotary tables and lifted constants."""

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
    """`function` of another tensor, row by row: it must treat each index of axis 0 alone and keep axis 0."""

    source: LazyTensor
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Map the same rows of the source."""
        return self.function(self.source.rows(start, stop))


@dataclass(frozen=True)
class Computed(LazyTensor):
    """A function of other tensors as a whole."""

    sources: tuple[LazyTensor, ...]
    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Compute, then slice."""
        value = self.read()
        return value[start:stop] if value.ndim else value

    def read(self) -> Tensor:
        """Compute."""
        return self.function(*(source.read() for source in self.sources))


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
        """Join the rows that fall into the slice."""
        if self.axis:
            return torch.cat([source.rows(start, stop) for source in self.sources], self.axis)
        pieces, offset = [], 0
        for source in self.sources:
            low, high = max(start - offset, 0), min(stop - offset, source.shape[0])
            if low < high:
                pieces.append(source.rows(low, high))
            offset += source.shape[0]
        return torch.cat(pieces)


def concatenate(sources: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Join tensors along `axis`; one tensor is itself."""
    return sources[0] if len(sources) == 1 else Concatenated(tuple(sources), axis)


def swap_last(source: LazyTensor) -> LazyTensor:
    """Swap the last two axes: [E, N, K] row by row, [N, K] as a whole."""
    shape = (*source.shape[:-2], source.shape[-1], source.shape[-2])

    def swap(value: Tensor) -> Tensor:
        return value.transpose(-1, -2).contiguous()

    if len(shape) > 2:
        return Mapped(source, swap, shape, source.dtype)
    return Computed((source,), swap, shape, source.dtype)


class WeightStore(Mapping[str, LazyTensor]):
    """Named lazy tensors. Tied weights are one tensor under one name: aliases resolve to it."""

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
        """The name that a tied weight is stored under."""
        return self._aliases.get(name, name)

    def read(self, name: str) -> Tensor:
        """Values of the tensor called `name`."""
        return self[name].read()

    def with_tensors(self, tensors: Mapping[str, LazyTensor]) -> WeightStore:
        """A store that holds `tensors` too."""
        return WeightStore({**self._tensors, **tensors}, self._aliases)

    def only(self, names: Iterable[str]) -> WeightStore:
        """A store that holds the tensors called `names` alone, with the aliases that lead to them."""
        kept = {self.resolve(name) for name in names}
        return WeightStore(
            {name: tensor for name, tensor in self._tensors.items() if name in kept},
            {alias: name for alias, name in self._aliases.items() if name in kept},
        )
