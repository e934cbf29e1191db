"""Hypervolume of a front, and the contribution of further individuals."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

Array = np.ndarray


class Volume:
    """The hypervolume between a front and a reference point, as a share of the box from zero to that point.

    Zitzler and Thiele, "Multiobjective Optimization Using Evolutionary Algorithms", 1998. Rows that are not
    better than that point in every objective do not count; negative values count as zero.

    Args:
        worst: The reference point, all values positive: [m].
    """

    def __init__(self, worst: Sequence[float]) -> None:
        from pymoo.indicators.hv import HV

        self._worst = np.array(worst, dtype=np.float64)
        self._indicator = HV(ref_point=np.ones(len(worst)))

    def of(self, rows: Array) -> float:
        """The volume of a front [n, m]."""
        inside = self._inside(rows)
        return float(self._indicator(inside)) if len(inside) else 0.0

    def _inside(self, rows: Array) -> Array:
        scaled = np.clip(np.asarray(rows, dtype=np.float64).reshape(-1, len(self._worst)) / self._worst, 0.0, None)
        found: Array = scaled[(scaled < 1.0).all(axis=1)]
        return found

    def best(
        self, front: Array, candidates: Array, count: int, prices: Sequence[float] | None = None
    ) -> list[tuple[int, float]]:
        """Greedily choose the candidates that would add most to a front for their price.

        The contribution of a candidate never grows as others join the front (submodularity), so earlier contributions
        are upper bounds and most need not be computed again.

        Args:
            front: The present front, [n, m].
            candidates: The candidates, [c, m].
            count: Maximum number of candidates to choose.
            prices: What each candidate costs, above 0, [c]; None: all cost the same.

        Returns:
            Index and contribution of each chosen candidate, in order; candidates that add nothing are left out.
        """
        known, base = np.asarray(front).reshape(-1, len(self._worst)), self.of(front)
        costs = [1.0] * len(candidates) if prices is None else list(prices)
        # Entries: negative contribution for the price, index, and the number of chosen candidates when it was computed.
        waiting = [
            (-(self.of(np.vstack([known, row])) - base) / costs[index], index, 0)
            for index, row in enumerate(candidates)
        ]
        heapq.heapify(waiting)
        chosen: list[tuple[int, float]] = []
        while waiting and len(chosen) < count:
            worth, index, round_ = heapq.heappop(waiting)
            if -worth <= 1e-12:
                break
            if round_ == len(chosen):
                chosen.append((index, -worth * costs[index]))
                known = np.vstack([known, candidates[index]])
                base = self.of(known)
            else:
                again = self.of(np.vstack([known, candidates[index]])) - base
                heapq.heappush(waiting, (-again / costs[index], index, len(chosen)))
        return chosen
