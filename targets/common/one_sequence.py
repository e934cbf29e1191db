"""A runner whose runtime keeps the states of one sequence. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from moec.targets.base import Runner, RunnerLimits


class OneSequence(Runner):
    """Counts the tokens of a sequence and checks each step by `limits`.

    Attributes:
        target: What messages call the target.
        limits: What the runner takes.
    """

    target: ClassVar[str]
    limits: RunnerLimits
    _length = 0

    def reset(self) -> None:
        """Forget the sequence."""
        self._length = 0
        self._forget()

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue it, as far as `limits` allow; see `moec.targets.base.Runner`."""
        self.limits.check(self.target, input_ids, attention_mask, self._length)
        return self._continue(input_ids)

    @abstractmethod
    def _forget(self) -> None:
        """Bring the states to zeros."""

    @abstractmethod
    def _continue(self, input_ids: np.ndarray) -> np.ndarray:
        """Logits [1, S, V] float32 of more tokens [1, S]; `_length` grows with them."""
