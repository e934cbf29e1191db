"""Weights of the final Program whose values come from the artifact that is judged.

Codes that calibration chose are not chosen again to judge an artifact: they are read back from it. Comparing them with
the artifact would prove nothing, so they are held against the record of the export and against the checkpoint.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from moec.compiler.weights import LazyTensor


@dataclass(frozen=True)
class Finding:
    """What speaks for a weight that was read back.

    Attributes:
        recorded: Whether its codes are those that the export recorded.
        near: Whether it is as near to the checkpoint as rounding to its format leaves it.
        error: Its distance from the checkpoint, in steps of its grid.
    """

    recorded: bool
    near: bool
    error: float


class ReadBack(LazyTensor):
    """A weight that was read back from an artifact."""

    @abstractmethod
    def examine(self) -> Finding:
        """Hold the weight against the record of the export and against the checkpoint.

        Raises:
            ArtifactError: The artifact holds no codes on the grid of the plan.
        """
