"""Whether the use of the experts on a new text differs from that on the text of calibration by more than chance.

The measure is the Jensen-Shannon distance (Lin, "Divergence Measures Based on the Shannon Entropy", 1991; Endres and
Schindelin, "A New Metric for Probability Distributions", 2003) of the use of a layer's experts, in base 2: 0 is equal,
1 is disjoint. Tokens of one window depend on each other, so chance is measured by exchanging whole windows: if both
texts were alike, it would not matter which windows belong to which (permutation test; Good, "Permutation, Parametric
and Bootstrap Tests of Hypotheses", 2005). Holm's correction (1979) keeps the chance of any false alarm over all layers
at `LEVEL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import jensenshannon

from moec.compiler.measure.expert_use import ExpertUse

LEVEL = 0.05
PERMUTATIONS = 4999
_PIECE = 250
"""Permutations whose distances are computed at a time, which bounds the memory."""


@dataclass(frozen=True)
class LayerDrift:
    """The drift of one MoE layer.

    Attributes:
        layer: Number of the MoE layer.
        module: Its name.
        distance: Jensen-Shannon distance of the use of its experts.
        usual: Distance that chance exceeds in 5 % of all cases.
        p: Probability of this distance or a larger one by chance, corrected for the number of layers.
        drifted: Whether `p` is below 5 %.
        dropped_before: Share of the slots that were dropped on the text of calibration.
        dropped: Share of the slots that are dropped on the new text.
        more: Expert whose share has grown most.
        less: Expert whose share has shrunk most.
    """

    layer: int
    module: str
    distance: float
    usual: float
    p: float
    drifted: bool
    dropped_before: float
    dropped: float
    more: int
    less: int


def layer_drifts(
    before: ExpertUse, now: ExpertUse, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> list[LayerDrift]:
    """Compare the use of the experts on two texts, layer by layer; the result depends on nothing but the arguments.

    Args:
        before: Use on the text of calibration.
        now: Use on the new text, of the same layers.
        permutations: Number of exchanges of windows.
        seed: Seed of the exchanges.
    """
    random = np.random.default_rng(seed)
    known, new = len(before.layers[0].tokens), len(now.layers[0].tokens)
    chosen = np.array([random.permutation(known + new) < known for _ in range(permutations)])
    observed, chance, raised = [], [], []
    for old, fresh in zip(before.layers, now.layers, strict=True):
        pooled = np.concatenate([old.tokens, fresh.tokens]).astype(float)
        distance = float(distances(old.tokens.sum(0)[None], fresh.tokens.sum(0)[None])[0])
        by_chance = _by_chance(pooled, chosen)
        observed.append(distance)
        chance.append(float(np.quantile(by_chance, 1 - LEVEL)))
        raised.append((1 + int((by_chance >= distance - 1e-12).sum())) / (1 + permutations))
    return [_layer(number, before, now, observed[number], chance[number], p) for number, p in enumerate(holm(raised))]


def _layer(number: int, before: ExpertUse, now: ExpertUse, distance: float, usual: float, p: float) -> LayerDrift:
    old, fresh = before.layers[number], now.layers[number]
    change = _shares(fresh.tokens.sum(0)) - _shares(old.tokens.sum(0))
    return LayerDrift(
        number,
        old.module,
        distance,
        usual,
        p,
        p < LEVEL,
        old.dropped(before.length),
        fresh.dropped(now.length),
        int(change.argmax()),
        int(change.argmin()),
    )


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distances [n] of counts [n, E] and [n, E], in base 2."""
    found: np.ndarray = jensenshannon(first.astype(float), second.astype(float), base=2, axis=1)
    found[np.isnan(found)] = 0.0  # equal distributions may differ by rounding, and have no square root then
    return found


def _by_chance(pooled: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Distances [permutations] if the windows `chosen` [permutations, windows] were the first text."""
    pieces = []
    for start in range(0, len(chosen), _PIECE):
        part = chosen[start : start + _PIECE]
        pieces.append(distances(part @ pooled, ~part @ pooled))
    return np.concatenate(pieces)


def _shares(counts: np.ndarray) -> np.ndarray:
    found: np.ndarray = counts / max(1, counts.sum())
    return found


def holm(values: Sequence[float]) -> list[float]:
    """Probabilities of several tests, corrected so that the chance of any false alarm is what one test would have.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    order = np.argsort(values)
    found, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        found[index] = largest
    return found
