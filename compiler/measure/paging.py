"""What a token reads from disk if memory holds only the experts that were used last. Imports no torch.

An expert is found in memory if the experts that were used since its last use, of all layers, fit into it together with
the expert itself: the size of these experts is its reuse distance. So one pass over a sequence of routed experts gives
the hit rate for every size of the memory (Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage
hierarchies", 1970).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOKENS = 512
"""Tokens of a sequence that is drawn."""
WARM_UP = 0.25
"""Share of a sequence that only fills the memory and is not counted."""

NEVER = np.iinfo(np.int64).max
"""Reuse distance of an expert that was not used before."""

Layers = Sequence[Sequence[Sequence[int]]]
"""[MoE layer][token][slot] -> the expert; a slot that routing dropped is left out."""


@dataclass(frozen=True, eq=False)
class ReuseDistances:
    """The reuse distances of a sequence.

    Attributes:
        layers: For each MoE layer, the distances in bytes of all its uses of an expert that count.
        sizes: For each MoE layer, bytes of one expert.
        tokens: Number of tokens that count.
    """

    layers: tuple[np.ndarray, ...]
    sizes: tuple[int, ...]
    tokens: int

    def hit_rates(self, memory: int) -> tuple[float, ...]:
        """For each layer, the share of the uses that find their expert in `memory` bytes; 1 if there are none."""
        return tuple(float((found <= memory).mean()) if found.size else 1.0 for found in self.layers)

    def hit_rate(self, memory: int) -> float:
        """The share of all uses that find their expert in `memory` bytes; 1 if there are none."""
        uses = sum(found.size for found in self.layers)
        return sum(int((found <= memory).sum()) for found in self.layers) / uses if uses else 1.0

    def read(self, memory: int) -> float:
        """Bytes that a token reads from disk with `memory` bytes for experts."""
        missed = (size * int((found > memory).sum()) for size, found in zip(self.sizes, self.layers, strict=True))
        return sum(missed) / max(1, self.tokens)

    @property
    def used(self) -> float:
        """Bytes of the experts that a token uses."""
        return sum(size * found.size for size, found in zip(self.sizes, self.layers, strict=True)) / max(1, self.tokens)


def reuse_distances(
    layers: Layers,
    counts: Sequence[int],
    sizes: Sequence[int],
    warm_up: float = WARM_UP,
    *,
    from_start: bool = False,
) -> ReuseDistances:
    """The reuse distances of a sequence.

    Args:
        layers: The sequence, with the same number of tokens in every layer.
        counts: For each MoE layer, its number of experts.
        sizes: For each MoE layer, bytes of one expert.
        warm_up: Share of the tokens, from the start, that do not count.
        from_start: Whether nothing is in memory when the sequence begins, so that the first use of an expert is a miss
            whatever the size of the memory; else every expert was used once before, the first one last.
    """
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    weights = np.repeat(np.asarray(sizes, np.int64), counts)
    last = -np.arange(1, len(weights) + 1, dtype=np.int64)
    """When each expert was used last; no two are equal."""
    tokens = len(layers[0]) if layers else 0
    ignored, clock = int(tokens * warm_up), 0
    found: list[list[int]] = [[] for _ in layers]
    for token in range(tokens):
        for layer, rows in enumerate(layers):
            # The experts of a layer are known, and read, together.
            places = starts[layer] + np.asarray(rows[token], np.int64)
            if token >= ignored:
                distances = (last >= last[places, None]) @ weights
                found[layer] += np.where(from_start & (last[places] < 0), NEVER, distances).tolist()
            last[places] = clock + np.arange(places.size)
            clock += places.size
    return ReuseDistances(tuple(np.array(row, np.int64) for row in found), tuple(sizes), tokens - ignored)


def drawn_sequence(
    uses: Sequence[np.ndarray], slots: Sequence[float], tokens: int = TOKENS, seed: int = 0
) -> list[list[list[int]]]:
    """A sequence in which tokens are independent of each other.

    Args:
        uses: For each MoE layer, a number for each expert [E] to which its probability is proportional.
        slots: For each MoE layer, the mean number of experts that a token uses.
        tokens: Number of tokens.
        seed: Seed of the draws.
    """
    random = np.random.default_rng(seed)
    return [_drawn(np.asarray(row, float), mean, tokens, random) for row, mean in zip(uses, slots, strict=True)]


def _drawn(uses: np.ndarray, mean: float, tokens: int, random: np.random.Generator) -> list[list[int]]:
    """Experts of each token, drawn without replacement: the largest of log p plus Gumbel noise."""
    with np.errstate(divide="ignore"):
        scores = np.log(uses) + random.gumbel(size=(tokens, uses.size))
    order = np.argsort(-scores, axis=1)
    numbers = np.floor(mean + random.random(tokens)).astype(int).clip(0, int((uses > 0).sum()))
    return [row[:number].tolist() for row, number in zip(order, numbers, strict=True)]
