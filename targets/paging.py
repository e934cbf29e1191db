"""The contract of runners that leave experts on the disk until tokens are routed to them. Imports no torch."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from moec.targets.runners import Runner


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Bytes of the weights of an artifact as its runtime reads them.

    Attributes:
        dense: Bytes of the weights that every token reads.
        experts: For each MoE layer, bytes of one expert.
        counts: For each MoE layer, its number of experts.
    """

    dense: int
    experts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all weights, without tables of which a token reads one row."""
        return self.dense + sum(size * count for size, count in zip(self.experts, self.counts, strict=True))


@dataclass(eq=False)
class ExpertPaging:
    """How often an expert was in memory when tokens were routed to it.

    Args:
        layers: Number of MoE layers.

    Attributes:
        uses: For each MoE layer, how many experts steps used; one that several tokens of a step use counts once.
        hits: How many of them were in memory.
    """

    layers: InitVar[int]
    uses: np.ndarray = field(init=False)
    hits: np.ndarray = field(init=False)

    def __post_init__(self, layers: int) -> None:
        self.uses, self.hits = np.zeros(layers, np.int64), np.zeros(layers, np.int64)


@runtime_checkable
class PagingRunner(Runner, Protocol):
    """A runner that leaves experts on the disk until tokens are routed to them.

    Attributes:
        paging: Counts of this runner and its forks so far.
        note: What could not be done, for people; empty if there is nothing to say.
    """

    paging: ExpertPaging
    note: str
