"""Sequences that are decoded together: one step of a runner feeds a token to each of them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from moec.compiler.run.generate import Generator
from moec.compiler.run.session import Session
from moec.targets.runners import BatchingRunner, Runner


class Batch:
    """A batch whose members may join and leave between two steps.

    The states of the members are in one runner and all end in the same slot, so shorter sequences have left padding.
    States are copied only when the members change.

    Args:
        runner: A runner for the batch alone, for which `can_batch` is true.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._members: tuple[Session, ...] = ()

    def decode(self, sessions: Sequence[Session], tokens: Sequence[int]) -> None:
        """Feed one token to each sequence. Each session gets its logits (`Session.decoded`).

        Args:
            sessions: The members from now on, which have been prefilled.
            tokens: A token for each.
        """
        if tuple(sessions) != self._members:
            self._regroup(sessions)
        slots = 1 + max(len(session.tokens) for session in sessions)
        mask = np.ones((len(sessions), slots), np.int64)
        for row, session in zip(mask, sessions, strict=True):
            row[: session.row.padding] = 0
        logits = self._runner.decode(np.asarray(tokens, np.int64)[:, None], mask)
        for session, token, row in zip(sessions, tokens, logits, strict=True):
            session.decoded(token, row[-1])

    def _regroup(self, sessions: Sequence[Session]) -> None:
        assert isinstance(self._runner, BatchingRunner)
        rows = self._runner.gather([session.row for session in sessions])
        for session, row in zip(sessions, rows, strict=True):
            if not session.is_batched:
                session.runner.reset()  # frees the states that were copied
            session.row = row
        self._members = tuple(sessions)


class Batches:
    """Batches of sequences whose artifact gets the same scalar inputs.

    Args:
        generator: The artifact, for whose runner `can_batch` is true.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._open: dict[Hashable, tuple[Batch, ExitStack]] = {}

    def decode(
        self, key: Hashable, inputs: Mapping[str, float], sessions: Sequence[Session], tokens: Sequence[int]
    ) -> None:
        """Feed one token to each sequence of a batch. A sequence that was always alone is left to decode by itself.

        Args:
            key: The batch; a new one is opened.
            inputs: Values of scalar inputs.
            sessions: The members from now on, which have been prefilled.
            tokens: A token for each.
        """
        if len(sessions) == 1 and not sessions[0].is_batched:
            self._close(key)
            return
        if key not in self._open:
            stack = ExitStack()
            self._open[key] = Batch(stack.enter_context(self._generator.session(inputs)).runner), stack
        try:
            self._open[key][0].decode(sessions, tokens)
        except BaseException:
            self._close(key)  # the states are unknown
            raise

    def keep(self, keys: Collection[Hashable]) -> None:
        """Close all batches but `keys`."""
        for key in self._open.keys() - set(keys):
            self._close(key)

    def _close(self, key: Hashable) -> None:
        if key in self._open:
            self._open.pop(key)[1].close()
