"""The contract of a model file that another exporter made: what it holds, and how it is run. Files are only read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from moec.compiler.foreign.binding import Bindings
from moec.compiler.ir.program import Program
from moec.targets.model_files import Operator, StoredTensor
from moec.targets.runners import Runner

Choices = Callable[[np.ndarray], Mapping[int, np.ndarray]]
"""Token ids [1, T] of a new sequence -> MoE layer -> the experts that the file's own router chose for each, [T, k]."""


@dataclass(frozen=True, slots=True)
class Unseen:
    """The answer to a question that a file does not let one answer, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What one token costs in the experts.

    Attributes:
        computed: Experts that are computed for one token in a layer, the mean over the layers.
        read: Where this was read from, for people.
    """

    computed: float
    read: str


class ForeignModel(ABC):
    """A model file of another exporter.

    Attributes:
        format: Name of the format.
        path: What the user gave.
        files: The files that belong to it.
        producer: Who made it, as far as the file says.
        runtime: The runtime that runs it here, with its version and device.
        float_precision: "fp32", or "fp16" if activations are computed in half precision.
    """

    format: ClassVar[str]
    path: Path
    files: tuple[Path, ...]
    producer: str = ""
    runtime: str = ""
    float_precision: str = "fp32"

    @abstractmethod
    def open(self, program: Program, bindings: Bindings, *, threads: int = 0) -> Runner:
        """Open it for running; 0 threads: the runtime's default.

        Args:
            program: The checkpoint's Program, for the states and the vocabulary.
            bindings: Names that the user gave; the others are found.
            threads: Threads of the runtime.

        Raises:
            UsageError: Inputs or states cannot be bound.
            CheckpointError: The file is of another model.
            ArtifactError: The runtime cannot load it.
        """

    @abstractmethod
    def tensors(self) -> Sequence[StoredTensor]:
        """Every weight in the file."""

    @abstractmethod
    def operators(self) -> Sequence[Operator]:
        """Every node of the graph; empty where the file has none and the runtime builds it."""

    def choices(self, program: Program, bindings: Bindings) -> Choices | Unseen:  # noqa: ARG002
        """The experts that the file's own routers choose."""
        return Unseen(f"a file of {self.format} does not let one see what its routers choose")

    def cost(self, program: Program, bindings: Bindings) -> Cost | Unseen:  # noqa: ARG002
        """What one token costs in the experts."""
        return Unseen(f"a file of {self.format} does not let one see what is computed")
