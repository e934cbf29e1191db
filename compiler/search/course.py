"""Which part of the graph a measurement runs again, and children of an individual for which that part is small.

A measurement resumes after the choices that it shares with an earlier one; see `incremental`. So a child that differs
from a measured parent in its last layers alone costs less than one that differs in the first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from moec.compiler.search.operators import Moves, Random
from moec.compiler.search.space import Genome, Space

GENES = {"policy": ("rule", "level"), "prune": ("prune",), "format": ("format",)}
"""Kind of a choice of the runner -> the genes that encode it."""
TRIES = 8
"""Number of changes that are tried for one that reaches a tail."""
RECENT = 16
"""Number of individuals whose states are taken to be cached: what 2 GiB hold for small models and the usual text."""
FIXED = 0.15
"""Time of a measurement that does not depend on the choices, as a share of a whole one: the losses of the logits."""


class Course:
    """The genes in the order in which the graph depends on them.

    Args:
        space: The search space.
        sites: See `IncrementalRunner.course`.
    """

    def __init__(self, space: Space, sites: Sequence[tuple[float, tuple[str, int]]]) -> None:
        found: list[tuple[float, list[int]]] = []
        for share, (kind, index) in sites:
            places = [space.places[name, index] for name in GENES[kind] if (name, index) in space.places]
            if places:
                found.append((share, places))
        self._shares = [share for share, _ in found]
        self._places = [np.array(places) for _, places in found]
        self._known: Counter[tuple[int, ...]] = Counter()
        self.recent: deque[tuple[int, ...]] = deque()
        """The individuals that were measured last, which later ones resume from."""

    def record(self, genome: Sequence[int]) -> None:
        """Remember a measured individual."""
        self.recent.append(tuple(int(value) for value in genome))
        self._known.update(self._prefixes(np.asarray(genome)))
        if len(self.recent) > RECENT:
            self._known -= Counter(self._prefixes(np.array(self.recent.popleft())))

    def price(self, genome: Sequence[int]) -> float:
        """Time of a measurement as a share of one that starts from the tokens."""
        for share, prefix in zip(self._shares, self._prefixes(np.asarray(genome)), strict=True):
            if not self._known[prefix]:
                return FIXED + (1 - FIXED) * share
        return FIXED

    def _prefixes(self, genome: Genome) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        before: tuple[int, ...] = ()
        for places in self._places:
            before = (*before, *(int(value) for value in genome[places]))
            found.append(before)
        return found

    def child(self, parent: Genome, other: Genome, moves: Moves, random: Random) -> Genome:
        """An individual that differs from `parent` only after a random choice.

        There it has the genes of `other` in one of two cases, and then a change.
        """
        start = int(random.integers(len(self._places)))
        tail = np.concatenate(self._places[start:])
        found = parent.copy()
        if random.random() < 0.5:
            found[tail] = other[tail]
        for _ in range(TRIES):
            changed = moves.change(found, random)
            if (changed[tail] != found[tail]).any():
                found[tail] = changed[tail]
                break
        return found
