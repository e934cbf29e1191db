"""Model files that other tools made, as the runtime of a target runs them here. Imports no torch.

`moec validate FILE --against CHECKPOINT` judges such files (`moec.compiler.foreign`). A target whose runtime only it
knows offers the format of its files by `Target.file_format`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

Shape = tuple[int | None, ...]
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a file.

    Attributes:
        name: Its name.
        shape: Its shape; None: an axis of any length.
        dtype: Its numpy dtype.
        longest: Maximum length of each axis; None: no maximum is known.
    """

    name: str
    shape: Shape
    dtype: np.dtype[Any]
    longest: Shape | None = None

    def most(self, axis: int) -> int | None:
        """Maximum length of an axis: its length, if that is fixed; None: no maximum is known."""
        if not self.shape or self.shape[axis] is not None:
            return self.shape[axis] if self.shape else None
        return None if self.longest is None else self.longest[axis]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: Its name in the file.
        shape: Its shape; of packed codes, that of the values.
        precision: For people: "fp32", "fp16", "int4, block 32", "Q4_K".
        bits: Bits per value, without scales.
        block: Values that share a scale; None where there are no scales or one for a row.
        nbytes: Bytes in the file, those of scales and zero points included where they belong to it.
        read: Its values in float32, decoded, in `shape`; None where it cannot be read back.
    """

    name: str
    shape: tuple[int, ...]
    precision: str
    bits: float
    nbytes: int
    block: int | None = None
    read: Callable[[], np.ndarray] | None = field(default=None, compare=False)

    @property
    def quantized(self) -> bool:
        """Whether it holds codes and not floats."""
        return self.bits <= 8


@dataclass(frozen=True, slots=True)
class Operator:
    """One node of a file's graph.

    Attributes:
        kind: Its type, such as "QMoE".
        name: Its name.
        attributes: Its attributes.
        branch: Whether it is in a body that runs only if a condition holds, or in a loop.
    """

    kind: str
    name: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    branch: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """A product of a matrix [rows, inner] with one of [inner, outer]; `rows` may be the mean of several products."""

    rows: float
    inner: int
    outer: int


class FileSession(Protocol):
    """Runs a file, which keeps its states itself if it has any."""

    def reset(self) -> None:
        """Set every state to zero."""

    def run(self, feeds: Feeds) -> Mapping[str, np.ndarray]:
        """All inputs -> all outputs."""

    def products(self) -> Sequence[Product]:
        """The products that were computed since the session was made, by the shapes of their operands."""


class ModelFile(Protocol):
    """A file of another tool.

    Attributes:
        producer: Who made it, as far as the file says.
        runtime: What runs it here, with version and device.
        float_precision: "fp32", or "fp16" if activations are computed in half precision.
        inputs: Its inputs, states excluded.
        outputs: Its outputs.
        states: Number of states that it keeps.
        stands_in: See `moec.targets.runners.RunnerLimits`.
        top_k: For each top-k of the graph, names of its indices and of its scores, which a session can return.
    """

    producer: str
    runtime: str
    float_precision: str
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    states: int
    stands_in: str
    top_k: Sequence[tuple[str, str]]

    def session(self, also: Sequence[str] = ()) -> FileSession:
        """A session with states of its own.

        Args:
            also: Names of inner values that it returns beside the outputs.

        Raises:
            LoweringError: The file holds an operator that the runtime here does not have.
        """

    def tensors(self) -> Sequence[StoredTensor]:
        """Every weight."""

    def operators(self) -> Sequence[Operator]:
        """Every node of the graph."""


Opened = TypeVar("Opened")


@dataclass(frozen=True)
class FileFormat(Generic[Opened]):
    """A format of files of other tools.

    Attributes:
        name: Its name.
        sign: What a file of it is recognised by, for people.
        matches: Path and first bytes of a file, or of a directory none -> whether it is of the format.
        open: Opens a file. Raises ArtifactError if it is damaged.
        needs: Module that must be installed, and the extra that brings it; empty if moec itself needs it.
    """

    name: str
    sign: str
    matches: Callable[[Path, bytes], bool]
    open: Callable[[Path], Opened]
    needs: tuple[str, str] = ("", "")
