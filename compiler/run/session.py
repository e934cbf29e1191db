"""A session (one sequence on a runner), and an answer that is generated in it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from moec.compiler.run.disk_use import DiskUse
from moec.compiler.text.sampling import Sampling
from moec.compiler.text.stops import StopStrings
from moec.compiler.text.tokenizer import TextStream
from moec.targets.runners import BatchingRunner, Row, Runner, last_logits, limits_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 512
"""Largest number of prompt tokens that are fed at once: it limits the logits [tokens, vocabulary] and the time of a
step, for which other requests wait."""


@dataclass
class Statistics:
    """Counts and seconds of one answer.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        kept_tokens: Tokens of the prompt that were in the KV cache already.
        new_tokens: Tokens of the answer, without the one that ends it.
        prefill_seconds: Time of the prefill, without the time between its pieces.
        decode_seconds: Time of all decode steps.
        finish: "stop" after an end token or a stop string, "length" after the largest number of tokens; empty before
            the end.
        steps: Number of decode steps.
        disk: What all decode steps read from disk; None before the end.
    """

    prompt_tokens: int = 0
    kept_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: Literal["", "stop", "length"] = ""
    steps: int = 0
    disk: DiskUse | None = None

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second, without the first token, which the prefill yields; 0 if there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else 0.0

    def line(self) -> str:
        """The figures in one line."""
        kept = f" ({self.kept_tokens} of them from the KV cache)" if self.kept_tokens else ""
        return (
            f"prompt: {self.prompt_tokens} tokens{kept} in {self.prefill_seconds:.3f} s; "
            f"new: {self.new_tokens} tokens, {self.decode_rate:.1f} tokens/s"
        )

    def lines(self) -> list[str]:
        """The figures, with what decode steps read from disk in a second line."""
        return [self.line(), *([self.disk.line(self.steps)] if self.disk is not None and self.steps else [])]


class Session:
    """One sequence on a runner. Its KV cache is reused for the next sequence if that begins with the same tokens.

    Attributes:
        tokens: The tokens that the runner has seen.
        row: Where the states of the sequence are: in `runner`, or in a batch (`moec.compiler.run.batch`).
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.row = Row(runner)
        self.tokens: list[int] = []
        self._ahead: np.ndarray | None = None

    def reset(self) -> None:
        """Start a new sequence."""
        self.tokens, self.row, self._ahead = [], Row(self.runner), None
        self.runner.reset()

    @property
    def is_batched(self) -> bool:
        """Whether the states of the sequence are in a batch."""
        return self.row.runner is not self.runner

    def leave_batch(self) -> None:
        """Copy the states of the sequence from a batch back to `runner`."""
        if self.is_batched:
            assert isinstance(self.runner, BatchingRunner)
            (self.row,) = self.runner.gather([self.row])

    def decoded(self, token: int, logits: np.ndarray) -> None:
        """Record a step that a batch made for this sequence; `feed` yields its logits.

        Args:
            token: The token that was fed.
            logits: The logits [V] after it.
        """
        self.tokens.append(token)
        self._ahead = logits

    def kept(self, ids: Sequence[int]) -> int:
        """How many tokens of the sequence `ids` need not be computed again: all that were seen, or none.

        A runner cannot rewind, and at least one new token is needed to get logits.
        """
        seen = len(self.tokens)
        return seen if seen < len(ids) and self.tokens == list(ids[:seen]) else 0

    def feed(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Extend the sequence to `ids`, piece by piece.

        Args:
            ids: The whole sequence, at least one token.

        Yields:
            Logits [V] float32 after the last token of each piece; those of a batch's step if it has fed the last token.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and self.tokens == list(ids):
            yield ahead
            return
        position = 0 if self.is_batched else self.kept(ids)
        if not position:
            self.reset()
        while position < len(ids):
            piece = list(ids[position : position + self._most(position, len(ids))])
            try:
                (logits,) = last_logits(self.runner, np.asarray([piece], dtype=np.int64), start=not position)
            except BaseException:
                self.tokens = []  # the state of the runner is unknown, so the next sequence starts again
                raise
            self.tokens += piece
            position += len(piece)
            yield logits

    def _most(self, position: int, length: int) -> int:
        """The number of tokens to feed after the first `position` of `length` tokens.

        A runner that decodes few tokens at once gets the whole prompt in one piece and splits it itself.
        """
        most = limits_of(self.runner).max_decode
        return PIECE if most is None else most if position else length


class Answer:
    """One answer, computed step by step.

    Args:
        session: The session, which must not be used otherwise meanwhile.
        prompt: Token ids, at least one.
        sampling: Sampling settings.
        end_tokens: Tokens that end the answer and are not part of it.
        max_new_tokens: Largest number of new tokens.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        *,
        sampling: Sampling,
        end_tokens: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        self.session, self.prompt, self.sampling = session, list(prompt), sampling
        self.end_tokens, self.max_new_tokens = frozenset(end_tokens), max_new_tokens
        self.next_token: int | None = None
        """The token whose logits the next step needs; None before the end of the prompt and at the end."""
        self.statistics = Statistics(prompt_tokens=len(prompt), kept_tokens=session.kept(prompt))

    def tokens(self) -> Iterator[int | None]:
        """Yield the new token after each step, and None after each piece of the prompt but the last."""
        counts, seen = self.statistics, list(self.prompt)
        random = np.random.default_rng(self.sampling.seed)
        logits = np.empty(0)
        for logits in self._prefill():  # noqa: B007 - the logits of the last piece give the first token
            if len(self.session.tokens) < len(seen):
                yield None
        start = DiskUse.until_now(self.session.runner)
        try:
            yield from self._decoded(logits, random, seen)
        finally:
            counts.disk = DiskUse.until_now(self.session.runner).since(start)

    def _decoded(self, logits: np.ndarray, random: np.random.Generator, seen: list[int]) -> Iterator[int]:
        """Yield the new tokens, of which `logits` [V] give the first one; `seen` are the tokens of the prompt."""
        counts = self.statistics
        while (token := self.sampling.choose(logits, random, seen)) not in self.end_tokens:
            counts.new_tokens += 1
            seen.append(token)
            if counts.new_tokens == self.max_new_tokens:
                counts.finish = "length"
            self.next_token = None if counts.finish else token
            yield token
            if counts.finish:
                return
            start = time.perf_counter()
            (logits,) = self.session.feed(seen)
            counts.decode_seconds += time.perf_counter() - start
            counts.steps += 1
        counts.finish = "stop"

    def _prefill(self) -> Iterator[np.ndarray]:
        pieces = self.session.feed(self.prompt)
        while True:
            start = time.perf_counter()
            logits = next(pieces, None)
            self.statistics.prefill_seconds += time.perf_counter() - start
            if logits is None:
                return
            yield logits

    def pieces(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield text after each step; it is empty if the step completes no character.

        Args:
            tokenizer: Decodes the tokens.
            stop: Strings before which the answer ends.
        """
        stream, stops = TextStream(tokenizer, self.prompt), StopStrings(stop)
        for token in self.tokens():
            yield "" if token is None else stops.add(stream.add(token))
            if stops.found:
                self.statistics.finish = "stop"
                return
        yield stops.add(stream.end()) + stops.end()
        if stops.found:
            self.statistics.finish = "stop"
