"""Base of runners whose runtime keeps the states of one sequence. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from moec.targets.runners import Runner, RunnerLimits


class SingleSequenceRunner(Runner):
    """Counts the tokens of its one sequence and checks each step against `limits`.

    Attributes:
        target: Name of the target, for messages.
        limits: What the runner cannot run.
    """

    target: ClassVar[str]
    limits: RunnerLimits
    _length = 0

    def reset(self) -> None:
        """Drop the sequence and its states."""
        self._length = 0
        self._forget()

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue the sequence within `limits`; see `moec.targets.runners.Runner`."""
        self.limits.check(self.target, input_ids, attention_mask, self._length)
        return self._continue(input_ids)

    @abstractmethod
    def _forget(self) -> None:
        """Reset the states to zeros."""

    @abstractmethod
    def _continue(self, input_ids: np.ndarray) -> np.ndarray:
        """Run new tokens [1, S] and add S to `_length`; logits [1, S, V] float32."""
