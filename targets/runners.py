"""What runs an artifact: the contract of every runner, and what only some of them can do. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moec.compiler.common.errors import UsageError


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What a runner cannot run. The defaults are those of a runner without limits.

    Attributes:
        max_batch: Maximum number of sequences at once; None: no limit.
        padding: Whether `attention_mask` may hold zeros (left padding).
        max_sequence: Maximum number of tokens per sequence, past and new; None: the model alone sets the limit.
        prefill_lengths: Lengths that the artifact was specialised to; the runner splits or pads prompts to them.
        max_decode: Maximum number of tokens per decode step; None: no limit.
        max_shared_length: Length in tokens beyond which a sequence must not share a batch with others of other lengths
            (`moec.compiler.ir.analysis.max_shared_length`); None: no limit.
        repeats_bits: Whether equal inputs give bit-identical outputs, as on a CPU; a GPU may sum in any order.
        stands_in: Name of the substitute that runs here in place of the runtime that users have, such as "moec's
            executor for Core ML", or empty. Its speed and repeatability say nothing about the real runtime.
    """

    max_batch: int | None = None
    padding: bool = True
    max_sequence: int | None = None
    prefill_lengths: tuple[int, ...] = ()
    max_decode: int | None = None
    max_shared_length: int | None = None
    repeats_bits: bool = True
    stands_in: str = ""

    def check(self, target: str, input_ids: np.ndarray, attention_mask: np.ndarray | None, past: int) -> None:
        """Check a step: input_ids [B, S] int64, attention_mask [B, past + S], after `past` tokens of each sequence.

        Raises:
            UsageError: The step has more sequences, padding or tokens than the limits allow.
        """
        batch, new = input_ids.shape
        if self.max_batch is not None and batch > self.max_batch:
            raise UsageError(
                f"{batch} sequences at once: the {target} target runs at most {self.max_batch}",
                hint="run them one after another",
            )
        if not self.padding and attention_mask is not None and not np.all(attention_mask):
            raise UsageError(f"the {target} target does not support padding", hint="give each sequence without padding")
        if self.max_sequence is not None and past + new > self.max_sequence:
            raise UsageError(
                f"{past + new} tokens exceed the {self.max_sequence} that the KV cache holds",
                hint="export with a larger --context, or shorten the text",
            )


class Runner(Protocol):
    """Runs an artifact. This is the only interface of gates, `moec run`, perplexity and benchmarks. Arrays are numpy.

    Optional extensions: `LimitedRunner`, `AdjustableRunner`, `LastLogitsRunner`, `ForkableRunner`, `BatchingRunner` and
    `CountingRunner`.
    """

    def reset(self) -> None:
        """Drop all sequences and their states."""

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Start new sequences: input_ids [B, S] int64, attention_mask [B, S] or None -> logits [B, S, V] float32."""
        self.reset()
        return self.decode(input_ids, attention_mask)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue the sequences: input_ids [B, S], attention_mask [B, past + S] or None -> logits [B, S, V]."""

    def facts(self) -> Mapping[str, Any]:
        """Runtime, its version, threads and provider, for the report."""


@runtime_checkable
class LimitedRunner(Protocol):
    """A runner with limits; `limits_of` reads them of any runner."""

    limits: RunnerLimits


@runtime_checkable
class AdjustableRunner(Protocol):
    """A runner whose artifact has inputs with defaults.

    Attributes:
        overrides: Name of such an input -> float32 array that is fed in place of its default. For an input with one row
            per token, such as `inputs_embeds`, the array holds the rows of the next call's tokens.
    """

    overrides: dict[str, np.ndarray]


@runtime_checkable
class LastLogitsRunner(Protocol):
    """A runner that need not compute the logits of every token; the function `last_logits` checks for it."""

    def decode_last(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """As `Runner.decode`, with the logits of the last token alone: [B, V]."""


@runtime_checkable
class ForkableRunner(Protocol):
    """A runner that can hold several independent conversations; the function `fork` checks for it."""

    def fork(self) -> Runner:
        """A second runner of the same artifact: it shares the weights and has its own states."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a runner.

    Attributes:
        runner: The runner that holds it.
        index: Its row in the runner's batch.
        padding: Number of slots of left padding before its first token.
    """

    runner: Runner
    index: int = 0
    padding: int = 0


@runtime_checkable
class BatchingRunner(Protocol):
    """A runner whose batch can change between two steps; the function `can_batch` checks for it."""

    def gather(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """Drop all sequences and take copies of others, with left padding up to the longest.

        Args:
            rows: At least one sequence of this runner or of forks of it. The runners that hold them keep them.

        Returns:
            The sequences in this runner, in the same order.
        """


@runtime_checkable
class CountingRunner(Protocol):
    """A runner that counts which experts are used.

    Attributes:
        expert_tokens: MoE layer -> tokens of each expert so far [E], of this runner and its forks; empty if the
            artifact does not return them.
    """

    expert_tokens: Mapping[int, np.ndarray]


def limits_of(runner: Runner) -> RunnerLimits:
    """The limits of `runner`; no limits if it states none."""
    return runner.limits if isinstance(runner, LimitedRunner) else RunnerLimits()


def fork(runner: Runner) -> Runner:
    """A runner of the same artifact with sequences of its own; it shares the weights.

    Raises:
        UsageError: `runner` is not a `ForkableRunner`: its runtime keeps the states of one sequence only.
    """
    if not isinstance(runner, ForkableRunner):
        raise UsageError(
            "another text is being generated, and the runner of this target keeps one sequence at a time",
            hint="finish or close the other generation first, or open the artifact again with moec.load",
        )
    return runner.fork()


def last_logits(runner: Runner, input_ids: np.ndarray, *, start: bool) -> np.ndarray:
    """The logits [B, V] after the last of new tokens, as generating needs them.

    Args:
        runner: Any runner.
        input_ids: The new tokens [B, S].
        start: Whether to start new sequences with them.
    """
    if not isinstance(runner, LastLogitsRunner):
        logits: np.ndarray = (runner.prefill if start else runner.decode)(input_ids)[:, -1]
        return logits
    if start:
        runner.reset()
    return runner.decode_last(input_ids)


def can_batch(runner: Runner) -> bool:
    """Whether sequences of different lengths may join and leave a batch of `runner` between two steps."""
    limits = limits_of(runner)
    several = limits.padding and limits.max_batch != 1 and limits.max_shared_length != 0
    return several and isinstance(runner, BatchingRunner) and isinstance(runner, ForkableRunner)
