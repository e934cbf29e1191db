"""A sequence of tokens on a runner, and one answer that continues it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from moec.compiler.text.sampling import Sampling
from moec.compiler.text.stops import StopStrings
from moec.compiler.text.tokenizer import TextStream
from moec.targets.base import Runner, limits_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 512
"""Most tokens of a prompt that are fed at once: their logits are [tokens, vocabulary], and others wait so long."""


@dataclass
class Statistics:
    """Counts and seconds of one answer.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        kept_tokens: How many of these the runner had seen already.
        new_tokens: Tokens of the answer, the one that ends it not among them.
        prefill_seconds: From the start to the logits after the prompt, without the time between two pieces.
        decode_seconds: Of all steps after that.
        finish: Why it ended: at an end token or a stop string, or at the most tokens; empty where it did not end yet.
    """

    prompt_tokens: int = 0
    kept_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: Literal["", "stop", "length"] = ""

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one, which the prefill yields; 0 if there were none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else 0.0

    def line(self) -> str:
        """The figures in one line."""
        kept = f", {self.kept_tokens} of them kept from before," if self.kept_tokens else ""
        return (
            f"prompt: {self.prompt_tokens} tokens{kept} in {self.prefill_seconds:.3f} s; "
            f"new: {self.new_tokens} tokens, {self.decode_rate:.1f} tokens/s"
        )


class Session:
    """One sequence on a runner. What it has computed of a sequence is kept for the next one that begins with it.

    Attributes:
        tokens: What the runner has seen.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.tokens: list[int] = []

    def reset(self) -> None:
        """Forget the sequence."""
        self.tokens = []
        self.runner.reset()

    def kept(self, ids: Sequence[int]) -> int:
        """How many tokens of the sequence `ids` need not be computed again: all that were seen, or none.

        A runner cannot go back, and logits come with a new token alone.
        """
        seen = len(self.tokens)
        return seen if seen < len(ids) and self.tokens == list(ids[:seen]) else 0

    def feed(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Bring the sequence to `ids`, piece by piece.

        Args:
            ids: The whole sequence, at least one token.

        Yields:
            Logits [V] float32 after the last token of each piece.
        """
        position = self.kept(ids)
        if not position:
            self.reset()
        while position < len(ids):
            piece = list(ids[position : position + self._most(position, len(ids))])
            step = self.runner.decode if position else self.runner.prefill
            try:
                logits = step(np.asarray([piece], dtype=np.int64))
            except BaseException:
                self.tokens = []  # nobody knows how far the runner came: the next sequence starts again
                raise
            self.tokens += piece
            position += len(piece)
            yield logits[0, -1]

    def _most(self, position: int, length: int) -> int:
        """Tokens that may be fed after the first `position` of `length` ones.

        A runner that decodes few tokens at once is handed the whole prompt, which it cuts as it likes.
        """
        most = limits_of(self.runner).max_decode
        return PIECE if most is None else most if position else length


class Answer:
    """One answer, computed step by step.

    Args:
        session: The sequence that it continues; nobody else may use it meanwhile.
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        end_tokens: Tokens that end the answer and are no part of it.
        max_new_tokens: At most so many.
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
        self.statistics = Statistics(prompt_tokens=len(prompt), kept_tokens=session.kept(prompt))

    def tokens(self) -> Iterator[int | None]:
        """Yield a token after each step, and None after a piece of the prompt that is not its last."""
        counts, seen = self.statistics, list(self.prompt)
        random = np.random.default_rng(self.sampling.seed)
        logits = np.empty(0)
        for logits in self._prefill():  # noqa: B007 - those of the last piece are what the first token is chosen by
            if len(self.session.tokens) < len(seen):
                yield None
        while (token := self.sampling.choose(logits, random, seen)) not in self.end_tokens:
            counts.new_tokens += 1
            seen.append(token)
            if counts.new_tokens == self.max_new_tokens:
                counts.finish = "length"
            yield token
            if counts.finish:
                return
            start = time.perf_counter()
            (logits,) = self.session.feed(seen)
            counts.decode_seconds += time.perf_counter() - start
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
        """Yield text after each step, which is empty where no character was finished.

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
