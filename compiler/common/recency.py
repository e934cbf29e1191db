"""Which experts a limited memory holds: those that were used last. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class RecentExperts:
    """The experts of all layers that memory holds.

    Args:
        sizes: For each MoE layer, bytes of one expert.
        memory: Bytes of memory.
    """

    def __init__(self, sizes: Sequence[int], memory: int) -> None:
        self.sizes, self.memory, self.held = tuple(sizes), memory, 0
        self._order = dict[tuple[int, int], None]()
        """Layer and number of each expert, the one that was used last at the end."""

    def __contains__(self, expert: tuple[int, int]) -> bool:
        """Whether memory holds an expert, given by layer and number."""
        return expert in self._order

    def use(self, layer: int, experts: Iterable[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Use experts of a layer at once.

        Returns:
            Those that memory did not hold, and layer and number of those that it no longer holds.
        """
        missing = []
        for expert in dict.fromkeys(experts):
            if (layer, expert) in self._order:
                del self._order[layer, expert]
            else:
                missing.append(expert)
                self.held += self.sizes[layer]
            self._order[layer, expert] = None
        dropped = []
        while self.held > self.memory and self._order:
            oldest = next(iter(self._order))
            del self._order[oldest]
            self.held -= self.sizes[oldest[0]]
            dropped.append(oldest)
        return missing, dropped
