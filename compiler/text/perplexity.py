"""Perplexity by teacher forcing, and the comparison of two models on the same windows. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Told = Callable[[int, int], None]
RESAMPLES, LEVEL = 2000, 0.95


class LanguageModel(Protocol):
    """The interface of a model for perplexity, which Runners of targets and the interpreter's runner have."""

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [B, S, V] float32 of input_ids [B, S]."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of a candidate with a reference on windows of text.

    Attributes:
        reference: Mean negative log likelihood of each window under the reference, nats, [n].
        candidate: Mean negative log likelihood of each window under the candidate, nats, [n].
        divergences: Mean KL(reference || candidate) per token of each window, nats, [n].
        agreement: Share of tokens with the same most likely next token.
        tokens: Number of predicted tokens.
    """

    reference: np.ndarray
    candidate: np.ndarray
    divergences: np.ndarray
    agreement: float
    tokens: int

    @property
    def divergence(self) -> float:
        """Mean KL(reference || candidate) per token, nats."""
        return float(self.divergences.mean())

    @property
    def increase(self) -> float:
        """Relative increase of perplexity: 0.01 is 1 %."""
        return math.exp(float((self.candidate - self.reference).mean())) - 1

    def interval(self) -> tuple[float, float]:
        """Paired bootstrap interval of `increase` over windows."""
        return increase_interval(self.candidate - self.reference)


def increase_interval(differences: np.ndarray) -> tuple[float, float]:
    """Bootstrap interval of a relative increase of perplexity: 95 %, percentile method, 2000 resamples of the windows.

    Args:
        differences: Mean loss of each window over that of another model, nats, [n].
    """
    draws = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    means = np.exp(differences[draws].mean(axis=1)) - 1
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities [..., V] float32 from logits [..., V], with one temporary copy."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    result: np.ndarray = shifted
    return result


def kl_divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(P || Q), summed over positions: sum over t and v of P(v | t) * (log P(v | t) - log Q(v | t)).

    Kullback and Leibler, "On Information and Sufficiency", 1951. Float32 values are summed in float64.

    Args:
        expected: Log probabilities under P, [..., V] float32.
        found: Log probabilities under Q, [..., V] float32.

    Returns:
        The sum in nats; divide by the number of positions for the mean.
    """
    return float((np.exp(expected) * (expected - found)).sum(dtype=np.float64))


def losses(runner: LanguageModel, windows: np.ndarray, *, told: Told = lambda _done, _total: None) -> np.ndarray:
    """Mean negative log likelihood of each window, nats.

    Args:
        runner: The model.
        windows: Token ids [n, length]; the first token of each window is given, the others are predicted.
        told: Called after each window with the number of finished and of all windows.

    Returns:
        [n] float64.
    """
    result = np.empty(len(windows))
    for index, window in enumerate(windows):
        logs = log_softmax(runner.prefill(window[None])[0, :-1])
        result[index] = _loss(logs, window)
        told(index + 1, len(windows))
    return result


def perplexity(values: Sequence[float] | np.ndarray) -> float:
    """Perplexity from the mean losses of windows of equal length, in nats."""
    return math.exp(float(np.mean(values)))


def compare(
    reference: LanguageModel, candidate: LanguageModel, windows: np.ndarray, *, told: Told = lambda _done, _total: None
) -> Comparison:
    """Run both models over the windows, with the logits of one window in memory; arguments as for `losses`."""
    return compare_each(reference, [candidate], windows, told=told)[0]


def compare_each(
    reference: LanguageModel,
    candidates: Sequence[LanguageModel],
    windows: np.ndarray,
    *,
    told: Told = lambda _done, _total: None,
) -> list[Comparison]:
    """Compare several models with one reference, which runs once for each window; otherwise as `compare`."""
    every, divergences = np.empty((1 + len(candidates), len(windows))), np.empty((len(candidates), len(windows)))
    same = np.zeros(len(candidates))
    for index, window in enumerate(windows):
        expected = log_softmax(reference.prefill(window[None])[0, :-1])
        every[0, index] = _loss(expected, window)
        for row, candidate in enumerate(candidates):
            found = log_softmax(candidate.prefill(window[None])[0, :-1])
            every[row + 1, index] = _loss(found, window)
            divergences[row, index] = kl_divergence(expected, found) / len(expected)
            same[row] += float((expected.argmax(-1) == found.argmax(-1)).sum())
        told(index + 1, len(windows))
    tokens = windows.size - len(windows)
    return [
        Comparison(every[0], every[row + 1], divergences[row], float(same[row]) / tokens, tokens)
        for row in range(len(candidates))
    ]


def _loss(logs: np.ndarray, window: np.ndarray) -> float:
    """Mean negative log likelihood, nats, of window [length] under log probabilities [length - 1, V]."""
    return -float(np.take_along_axis(logs, window[1:, None], axis=-1).mean(dtype=np.float64))
