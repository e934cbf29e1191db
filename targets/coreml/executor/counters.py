"""Cost of a run per operation: executed multiply-accumulates and weight bytes read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of some operations.

    Args:
        macs: Executed multiply-accumulates.
        weight_bytes: Bytes read from the weight file, as stored (quantized), in all runs together. For a
            gathered or sliced weight, only the part that was taken counts.
    """

    macs: int = 0
    weight_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.weight_bytes + other.weight_bytes)


class Counters:
    """Costs of a session, by operation.

    A scope is a prefix of names: it covers every operation whose own name, or that of a `cond` or
    `while_loop` around it, starts with it. With `""` it covers all.
    """

    def __init__(self) -> None:
        self._costs: dict[tuple[str, ...], Cost] = {}

    def add(self, path: tuple[str, ...], cost: Cost) -> None:
        """Record one run of the operation at `path`: names of the enclosing control flow, then its own."""
        self._costs[path] = self._costs.get(path, Cost()) + cost

    def total_of(self, name: str) -> Cost:
        """Cost of the operations called `name`."""
        return sum((cost for path, cost in self._costs.items() if path[-1] == name), Cost())

    def total(self, scope: str = "") -> Cost:
        """Cost of all operations in `scope`."""
        within = (cost for path, cost in self._costs.items() if any(name.startswith(scope) for name in path))
        return sum(within, Cost())
