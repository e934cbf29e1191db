"""The inputs of the parity gate, drawn with fixed seeds so that a verdict can be reproduced."""

from __future__ import annotations

import importlib.resources
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from moec.compiler.common.model_config import context_length
from moec.compiler.ir.operands import Attention
from moec.compiler.ir.program import ATTENTION, Program
from moec.compiler.text.tokenizer import encode, open_tokenizer
from moec.targets.runners import RunnerLimits

SHAPES = ((1, 1, 9), (2, 5, 0), (2, 5, 7))
"""Batch size, new tokens and tokens in the past."""

PADDED_LENGTHS = (9, 5)
TEXT = ("golden_models", "olmoe-tiny", "texts", "calibration.txt")
TEXT_CHARACTERS = 50_000  # more text than the gates can use would only cost time in the tokenizer


@dataclass(frozen=True, eq=False)
class Case:
    """A batch of sequences, and the steps in which they are fed.

    Attributes:
        name: For reports.
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64 with 0 where a slot is left padding, or None.
        steps: Number of tokens of the prefill and of each decode step; their sum is T.
        new_tokens: Number of tokens that are then generated greedily.
    """

    name: str
    input_ids: np.ndarray
    attention_mask: np.ndarray | None
    steps: tuple[int, ...]
    new_tokens: int = 0

    def with_other_tokens(self, prompts: Prompts) -> Case:
        """The same case with other token ids."""
        ids = prompts.text(*self.input_ids.shape)
        return replace(self, input_ids=ids if self.attention_mask is None else np.where(self.attention_mask, ids, 0))


class Prompts:
    """An endless supply of token ids, determined by a seed.

    Args:
        vocab_size: Vocabulary size; ids are smaller.
        text_ids: Ids of a text from which pieces are taken; without it, ids are random.
        seed: Seed of the random generator.
    """

    def __init__(self, vocab_size: int, text_ids: np.ndarray | None = None, *, seed: int = 0) -> None:
        self._vocab_size, self._random = vocab_size, np.random.default_rng(seed)
        text = np.zeros(0, np.int64) if text_ids is None else np.asarray(text_ids, dtype=np.int64)
        self._text = text[text < vocab_size]

    @classmethod
    def of(cls, directory: Path, vocab_size: int, *, seed: int = 0) -> Prompts:
        """Prompts for the checkpoint in `directory`: text if it has a tokenizer.json, else random ids."""
        text = importlib.resources.files("moec").joinpath(*TEXT)
        tokenizer = directory / "tokenizer.json"
        if not (tokenizer.is_file() and text.is_file()):
            return cls(vocab_size, seed=seed)
        return cls(vocab_size, _encoded(directory.resolve(), tokenizer.stat().st_mtime_ns), seed=seed)

    @property
    def source(self) -> str:
        """Where the ids come from, for reports."""
        return "calibration text" if self._text.size else "random ids"

    def text(self, batch: int, length: int) -> np.ndarray:
        """Pieces of the text, or random ids without a text: [batch, length] int64."""
        if self._text.size <= length:
            return self.random(batch, length)
        starts = self._random.integers(0, self._text.size - length, size=batch)
        return np.stack([self._text[start : start + length] for start in starts])

    def random(self, batch: int, length: int) -> np.ndarray:
        """Ids drawn uniformly from the vocabulary: [batch, length] int64."""
        return self._random.integers(0, self._vocab_size, size=(batch, length), dtype=np.int64)


@lru_cache(maxsize=1)
def _encoded(directory: Path, changed: int) -> np.ndarray:  # noqa: ARG001 - part of the key of the cache
    """Ids of the text that comes with moec; all gates of an export take their prompts from it."""
    words = importlib.resources.files("moec").joinpath(*TEXT).read_text(encoding="utf-8")[:TEXT_CHARACTERS]
    return np.asarray(encode(open_tokenizer(directory), words, special=False), dtype=np.int64)


@dataclass(frozen=True)
class Bounds:
    """Limits of the shapes: those of the runner, and the tokens that model, runner and gate allow in one sequence."""

    runner: RunnerLimits
    max_tokens: int


def bounds(program: Program, limits: RunnerLimits, max_tokens: int) -> Bounds:
    """Bounds for `program` on a runner with `limits`; `max_tokens` is the gate's own limit."""
    # If rotary frequencies change at some length, longer sequences are checked too.
    scaled = 2 * max(program.rotary_borders, default=0)
    lengths = [max_tokens, max(context_length(program.config) or max_tokens, scaled)]
    if limits.max_sequence is not None:
        lengths.append(limits.max_sequence)
    return Bounds(limits, min(lengths))


def base_cases(
    program: Program, prompts: Prompts, bound: Bounds, long_prompt: int, new_tokens: int
) -> tuple[list[Case], list[str]]:
    """The cases of a parity check, and the cases that were left out, with reasons.

    Args:
        program: The Program; its attention windows and rotary borders get cases of their own.
        prompts: Source of the token ids.
        bound: Limits of the shapes.
        long_prompt: Tokens of the longest prompt.
        new_tokens: Number of tokens that are generated greedily.
    """
    cases: list[Case] = []
    left_out: list[str] = []
    for batch, new, past in (*SHAPES, (1, long_prompt, 0)):
        _add_shape(cases, left_out, prompts, bound, (batch, new, past))
    for length in bound.runner.prefill_lengths:
        _add_shape(cases, left_out, prompts, bound, (1, length, 0))
        _add_shape(cases, left_out, prompts, bound, (1, length + 1, 0))
    _add_padded(cases, left_out, prompts, bound)
    for kind, window in attention_windows(program):
        _add_window(cases, left_out, prompts, bound, kind, window)
    for border in program.rotary_borders:
        _add_window(cases, left_out, prompts, bound, "unscaled rotary", border)
    if new_tokens:
        _add_greedy(cases, left_out, prompts, bound, new_tokens)
    return cases, left_out


def attention_windows(program: Program) -> list[tuple[str, int]]:
    """Kind and size of every attention window or chunk in `program`, each once."""
    found = {(own.kind, own.window) for own in map(Attention.of, program.nodes(ATTENTION))}
    return sorted((kind, window) for kind, window in found if kind != "causal")


def split_steps(steps: tuple[int, ...], limits: RunnerLimits) -> tuple[int, ...]:
    """Split decode steps that are longer than the runner takes at once."""
    if limits.max_decode is None:
        return steps
    return (steps[0], *itertools.chain.from_iterable(_pieces(size, limits.max_decode) for size in steps[1:]))


def _pieces(size: int, most: int) -> Iterator[int]:
    while size > 0:
        yield min(size, most)
        size -= most


def _add_shape(
    cases: list[Case], left_out: list[str], prompts: Prompts, bound: Bounds, shape: tuple[int, int, int]
) -> None:
    batch, new, past = shape
    most = bound.runner.max_batch
    if most is not None and batch > most:
        left_out.append(f"batch {batch} (the runner takes {most})")
        batch = most
    if new + past > bound.max_tokens:
        left_out.append(f"{new + past} tokens (limit {bound.max_tokens})")
        past = min(past, bound.max_tokens // 2)
        new = bound.max_tokens - past
    name = f"batch {batch}, sequence {new}, past {past}"
    if any(case.name == name for case in cases):
        return
    steps = split_steps((past, new) if past else (new,), bound.runner)
    cases.append(Case(name, prompts.text(batch, new + past), None, steps))


def _add_padded(cases: list[Case], left_out: list[str], prompts: Prompts, bound: Bounds) -> None:
    width, decoded = PADDED_LENGTHS[0], 3
    most = bound.runner.max_batch
    if not bound.runner.padding:
        left_out.append("left padding (the runner takes none)")
        return
    if width + decoded > bound.max_tokens:
        left_out.append(f"left padding at {width + decoded} tokens (limit {bound.max_tokens})")
        return
    lengths = PADDED_LENGTHS if most is None or most > 1 else PADDED_LENGTHS[1:]
    mask = np.ones((len(lengths), width + decoded), dtype=np.int64)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    ids = np.where(mask == 1, prompts.text(len(lengths), width + decoded), 0)
    steps = split_steps((width, 1, decoded - 1), bound.runner)
    cases.append(Case(f"left-padded batch of {len(lengths)}", ids, mask, steps))


def _add_window(
    cases: list[Case], left_out: list[str], prompts: Prompts, bound: Bounds, kind: str, window: int
) -> None:
    """Add a case that exceeds the window in the prefill, and one that exceeds it while decoding."""
    for name, steps in (
        (f"prefill past the {kind} window of {window}", (window + 5, 1, 2)),
        (f"decode past the {kind} window of {window}", (max(window - 1, 1), 1, 1, 1, 2)),
    ):
        if sum(steps) > bound.max_tokens:
            left_out.append(f"{name} ({sum(steps)} tokens, limit {bound.max_tokens})")
        else:
            cases.append(Case(name, prompts.text(1, sum(steps)), None, split_steps(steps, bound.runner)))


def _add_greedy(cases: list[Case], left_out: list[str], prompts: Prompts, bound: Bounds, new_tokens: int) -> None:
    prompt = min(16, max(1, bound.max_tokens // 4))
    possible = min(new_tokens, bound.max_tokens - prompt)
    if possible < new_tokens:
        left_out.append(f"{new_tokens - possible} of {new_tokens} greedy tokens (limit {bound.max_tokens})")
    cases.append(Case(f"{possible} greedy tokens", prompts.text(1, prompt), None, (prompt,), possible))
