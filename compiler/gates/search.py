"""Finds inputs that reach an expert which ordinary prompts do not reach.

Trained routers, and selection biases above all, leave some experts to one token in ten thousand. Waiting for that token
costs more than looking for it: short sequences are mutated and those kept that bring the expert nearest to being chosen
(a (mu + lambda) evolution strategy on the distance of the expert's score from the k-th best).

A model is causal, so a sequence of T tokens is T trials: the score of a token depends on what is before it. Hence a
mutation replaces one token that the nearest position sees, and draws all tokens behind it anew: they are further trials
in a context that is known to be good. A population that gets no nearer is given up for a new one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.gates.cases import Prompts
from moec.compiler.gates.ties import SELECTIONS, decision_nodes
from moec.compiler.interpreter import ProgramRunner
from moec.compiler.program import EXPERTS, Program

LENGTH, PARENTS, CHILDREN = 10, 4, 4
PATIENCE = 12
"""Generations without a nearer sequence after which the search starts anew."""


def selections(program: Program) -> dict[int, fx.Node]:
    """MoE layer -> the node that chooses its experts: the nearest top-k or argmax over all of them.

    It may choose among more: experts that compute nothing come after those that do.
    """
    decisions = decision_nodes(program.graph)
    found: dict[int, fx.Node] = {}
    for row, node in zip(program.layers, program.nodes(EXPERTS), strict=True):
        pending, seen = deque([node.args[1]]), set[fx.Node]()
        while pending and row.index not in found:
            current = pending.popleft()
            if not isinstance(current, fx.Node) or current in seen or current.target is EXPERTS:
                continue
            seen.add(current)
            if current in decisions and current.target in SELECTIONS and _width(current) >= row.num_experts:
                found[row.index] = current
            pending.extend(current.all_input_nodes)
    return found


def _width(node: fx.Node) -> int:
    scores = node.args[0]
    assert isinstance(scores, fx.Node)
    return int(scores.meta["val"].shape[-1])


@dataclass(frozen=True, eq=False)
class _Population:
    """Sequences, how near each comes to the expert, and where.

    Attributes:
        ids: [B, T] int64.
        distance: [B] float32, at least 0 where the expert is chosen.
        position: [B] int64.
    """

    ids: np.ndarray
    distance: np.ndarray
    position: np.ndarray

    def best(self, count: int) -> _Population:
        """The `count` nearest, the nearest first."""
        order = np.argsort(-self.distance, kind="stable")[:count]
        return _Population(self.ids[order], self.distance[order], self.position[order])

    def joined(self, other: _Population) -> _Population:
        """Both, `self` first."""
        return _Population(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.distance, other.distance]),
            np.concatenate([self.position, other.position]),
        )


class ExpertSearch:
    """Searches on the reference alone.

    Args:
        program: The Program whose routers decide.
        prompts: Source of tokens.
        max_tokens: Longest sequence.
    """

    def __init__(self, program: Program, prompts: Prompts, max_tokens: int) -> None:
        self._nodes = selections(program)
        self._prompts, self._length = prompts, min(LENGTH, max_tokens)
        self._runner = ProgramRunner(program, observer=self._observe)
        self._wanted: tuple[fx.Node, int] | None = None
        self._seen = torch.zeros(0)
        self.tokens = 0

    def _observe(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> None:  # noqa: ARG002
        if self._wanted is not None and node is self._wanted[0]:
            self._seen = _distance(args, self._wanted[1])

    def find(self, layer: int, expert: int, budget: int, reaches: Callable[[np.ndarray], bool]) -> np.ndarray | None:
        """Look for a sequence that reaches `expert` of `layer`.

        Args:
            layer: Index of the MoE layer.
            expert: Index of the expert.
            budget: Tokens that may be tried.
            reaches: Says whether a sequence [1, T] really does: a routing policy may drop the slot again.

        Returns:
            The sequence [1, T] int64, or None where none was found.
        """
        if layer not in self._nodes:
            return None
        self._wanted = (self._nodes[layer], expert)
        first = self.tokens
        while self.tokens - first < budget:
            found = self._climb(first + budget, reaches)
            if found is not None:
                return found
        return None

    def _climb(self, last: int, reaches: Callable[[np.ndarray], bool]) -> np.ndarray | None:
        """Mutate one population until it reaches the expert, gets no nearer, or `last` tokens were tried in all."""
        pool = self._prompts.random(PARENTS * CHILDREN, self._length)
        best = _Population(pool, *self._score(pool)).best(PARENTS)
        nearest, idle = -np.inf, 0
        while True:
            if best.distance[0] > nearest:
                nearest, idle = best.distance[0], 0
                if nearest >= 0 and reaches(best.ids[:1]):
                    return best.ids[:1]
            else:
                idle += 1
            if idle > PATIENCE or self.tokens >= last:
                return None
            pool = self._children(best)
            best = best.joined(_Population(pool, *self._score(pool))).best(PARENTS)

    def _score(self, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest distance of each sequence, and the position that has it: [B] each."""
        self._runner.prefill(pool)
        self._runner.reset()
        self.tokens += pool.size
        distances = self._seen.reshape(*pool.shape, -1).amax(-1).numpy()
        return distances.max(1), distances.argmax(1)

    def _children(self, parents: _Population) -> np.ndarray:
        """Children of each parent: one token up to its position replaced, and those behind it drawn anew."""
        ids, position = np.repeat(parents.ids, CHILDREN, axis=0), np.repeat(parents.position, CHILDREN)
        replaced = (self._prompts.chance(position.shape) * (position + 1)).astype(np.int64)
        columns = np.arange(self._length)
        fresh = (columns == replaced[:, None]) | (columns > position[:, None])
        return np.where(fresh, self._prompts.random(*ids.shape), ids)


def _distance(args: tuple[Any, ...], expert: int) -> Tensor:
    """Score of the expert minus the last score that is chosen, at least 0 where it is chosen: [T] float32."""
    scores: Tensor = args[0].float().reshape(-1, args[0].shape[-1])
    finite = torch.where(scores.isfinite(), scores, 0)
    # Masked experts (group limits) are farther than any other.
    scores = torch.where(scores.isfinite(), scores, finite.amin() - 1)
    count = args[1] if len(args) > 1 and isinstance(args[1], int) and args[1] > 0 else 1
    return scores[:, expert] - scores.topk(count, -1).values[:, -1]
