"""What a run cost: executed multiply-accumulates and weight bytes read, per operation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of some operations.

    Args:
        runs: How often they ran.
        macs: Multiply-accumulates that they executed.
        weight_bytes: Bytes of the weight file that they read, as stored (quantized), each time they ran.
            Of a gathered or sliced weight only the share that was taken counts.
    """

    runs: int = 0
    macs: int = 0
    weight_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.runs + other.runs, self.macs + other.macs, self.weight_bytes + other.weight_bytes)


class Counters:
    """Costs since the last reset, by operation.

    A scope is a prefix of names: it covers every operation whose own name, or that of a `cond` or
    `while_loop` around it, starts with it. With `""` it covers all.
    """

    def __init__(self) -> None:
        self._costs: dict[tuple[str, tuple[str, ...]], Cost] = {}

    def add(self, op_type: str, path: tuple[str, ...], cost: Cost) -> None:
        """Record one run of the operation at `path`: names of the control flow around it, and its own."""
        key = (op_type, path)
        self._costs[key] = self._costs.get(key, Cost()) + cost

    def total(self, scope: str = "") -> Cost:
        """Cost of all operations in `scope`."""
        return sum((cost for _, cost in self._within(scope)), Cost())

    def by_type(self, scope: str = "") -> dict[str, Cost]:
        """Cost of the operations in `scope` by op type."""
        costs: defaultdict[str, Cost] = defaultdict(Cost)
        for op_type, cost in self._within(scope):
            costs[op_type] += cost
        return dict(costs)

    def by_name(self, scope: str = "") -> dict[str, Cost]:
        """Cost of the operations in `scope` by name, the names of control flow around them in front."""
        costs: defaultdict[str, Cost] = defaultdict(Cost)
        for (_, path), cost in self._costs.items():
            if any(name.startswith(scope) for name in path):
                costs["/".join(path)] += cost
        return dict(costs)

    def reset(self) -> None:
        """Forget everything."""
        self._costs.clear()

    def _within(self, scope: str) -> Iterator[tuple[str, Cost]]:
        for (op_type, path), cost in self._costs.items():
            if any(name.startswith(scope) for name in path):
                yield op_type, cost
