"""Finds inputs that reach an expert which ordinary prompts do not reach.

Trained routers, and selection biases above all, leave some experts to one token in ten thousand. Waiting for that token
costs more than looking for it: short sequences are mutated and those kept that bring the expert nearest to being chosen
(a (mu + lambda) evolution strategy on the distance of the expert's score from the k-th best).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.gates.cases import Prompts
from moec.compiler.gates.ties import SELECTIONS, decision_nodes
from moec.compiler.interpreter import ProgramRunner
from moec.compiler.program import EXPERTS, Program

LENGTH, PARENTS, CHILDREN = 6, 4, 8
MUTATIONS = 1.5
"""Tokens of a sequence that a mutation replaces, on average."""


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
        pool = self._prompts.random(PARENTS * CHILDREN, self._length)
        spent = 0
        while spent < budget:
            scores = self._score(pool)
            spent += pool.size
            self.tokens += pool.size
            order = np.argsort(-scores, kind="stable")[:PARENTS]
            best = pool[order[:1]]
            if scores[order[0]] >= 0 and reaches(best):
                return best
            pool = self._mutate(pool[order])
        return None

    def _score(self, pool: np.ndarray) -> np.ndarray:
        """Nearest distance of each sequence: [B]."""
        self._runner.prefill(pool)
        self._runner.reset()
        return self._seen.reshape(pool.shape[0], -1).amax(1).numpy()

    def _mutate(self, parents: np.ndarray) -> np.ndarray:
        """The parents, and children of each with some tokens replaced."""
        pool = np.repeat(parents, CHILDREN, axis=0)
        replaced = self._prompts.chance(pool.shape) < MUTATIONS / self._length
        replaced[::CHILDREN] = False
        return np.where(replaced, self._prompts.random(*pool.shape), pool)


def _distance(args: tuple[Any, ...], expert: int) -> Tensor:
    """Score of the expert minus the last score that is chosen, at least 0 where it is chosen: [T] float32."""
    scores: Tensor = args[0].float().reshape(-1, args[0].shape[-1])
    finite = torch.where(scores.isfinite(), scores, 0)
    # Masked experts (group limits) are farther than any other.
    scores = torch.where(scores.isfinite(), scores, finite.amin() - 1)
    count = args[1] if len(args) > 1 and isinstance(args[1], int) and args[1] > 0 else 1
    return scores[:, expert] - scores.topk(count, -1).values[:, -1]
