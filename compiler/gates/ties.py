"""Finds decisions of routers and indexers that are ties, and the experts of each token.

Routing is discontinuous: if the k-th and the (k+1)-th score of a token are almost equal, two correct implementations
may choose different experts, and their logits differ by far more than rounding. Ties are found at the decision nodes of
the reference: top-k and argmax whose indices are used, and comparisons of floats (thresholds of routing policies), if
they lead to an experts node without another experts or attention node in between. An indexer, which selects the tokens
to attend to, decides likewise.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.ir.analysis import ancestors, is_mixer
from moec.compiler.ir.indexer import token_scores
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.ops import visible
from moec.compiler.ir.program import EXPERTS, INDEXER, Program

aten = torch.ops.aten


def _top_k_gap(scores: Tensor, count: int, dim: int = -1, largest: bool = True, *_: object) -> Tensor:
    """Relative gap between the last score taken and the first one left out: the shape of `scores` without `dim`."""
    scores = (scores.double() if largest else -scores.double()).movedim(dim, -1)
    return _cut_gap(scores, torch.full(scores.shape[:-1], count), negated=not largest)


def _cut_gap(scores: Tensor, counts: Tensor, negated: bool = False) -> Tensor:
    """Relative gap after the `counts` largest of `scores` [..., N]: [...]; infinite if no score is left out.

    It is relative to the last score taken if no score is negative (probabilities, whose errors scale with their value),
    else to the largest |score| (logits). `negated`: smaller scores are better, and `scores` holds their negatives.
    """
    if not scores.shape[-1]:
        return torch.full(counts.shape, torch.inf)
    ordered = scores.sort(-1, descending=True).values
    last = scores.shape[-1] - 1
    taken = ordered.gather(-1, (counts - 1).clamp(0, last).unsqueeze(-1)).squeeze(-1)
    left = ordered.gather(-1, counts.clamp(0, last).unsqueeze(-1)).squeeze(-1)
    finite = torch.where(scores.isfinite(), scores, 0)
    one_sign = (finite <= 0).all(-1) if negated else (finite >= 0).all(-1)
    scale = torch.where(one_sign, taken.abs(), finite.abs().amax(-1)).clamp(min=1e-30)
    gap = torch.nan_to_num((taken - left) / scale, nan=torch.inf, posinf=torch.inf)
    return torch.where((counts > 0) & (counts <= last), gap, torch.inf)


def _selection_gap(operands: tuple[Any, ...], selected: Tensor, keys: Tensor) -> Tensor:
    """Gap between the lowest score that an indexer selects and the highest that it leaves, relative to the largest.

    Args:
        operands: The arguments of `moec::indexer`.
        selected: Its first result, [B, S, T] bool; scores that are equal bit by bit are taken or left together.
        keys: Its second result.

    Returns:
        [B, S], infinite where nothing visible is left.
    """
    query, _, weights, _, position, mask, scale, kind, window, _ = operands
    left = visible(position, keys.shape[2], mask, kind, window) & ~selected
    scores = token_scores(query, keys, weights, scale).double()
    gap = scores.masked_fill(~selected, torch.inf).amin(-1) - scores.masked_fill(~left, -torch.inf).amax(-1)
    return gap / scores.masked_fill(~(left | selected), 0).abs().amax(-1).clamp(min=1e-30)


def _argmax_gap(scores: Tensor, dim: int | None = -1, *_: object) -> Tensor:
    return _top_k_gap(scores, 1, -1 if dim is None else dim)


def _comparison_gap(left: Tensor, right: Tensor | float, *_: object) -> Tensor:
    """Difference of the two sides, relative to the larger one, or to 1 if both are smaller.

    Small sides are shares of a sum or differences of scores (as in a jitter threshold), whose errors are those of the
    sum or the scores. Sides with equal bits are the same value by construction, unless the node is `_independent`.
    """
    first = left.double()
    second = right.double() if isinstance(right, Tensor) else torch.tensor(float(right), dtype=torch.float64)
    scale = torch.maximum(first.abs(), second.abs()).clamp(min=1.0)
    gap = torch.nan_to_num((first - second).abs() / scale, nan=torch.inf, posinf=torch.inf)
    return torch.where(first == second, torch.inf, gap)


def _floor_gap(value: Tensor, *_: object) -> Tensor:
    """Distance to the nearest integer, where rounding down jumps by 1; relative as in `_comparison_gap`."""
    exact = value.double()
    return torch.nan_to_num((exact - exact.round()).abs() / exact.abs().clamp(min=1.0), nan=torch.inf)


_GAPS: Mapping[Any, Callable[..., Tensor]] = {
    aten.floor.default: _floor_gap,
    aten.topk.default: _top_k_gap,
    aten.max.dim: _argmax_gap,
    aten.argmax.default: _argmax_gap,
    **dict.fromkeys(
        (
            *(aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor),
            *(aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar),
        ),
        _comparison_gap,
    ),
}

_VALUES_AND_INDICES = frozenset({aten.topk.default, aten.max.dim})


def decision_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes of `graph` at which a small change of a router's scores can change the experts."""
    operands = (Experts.of(node) for node in graph.find_nodes(op="call_function", target=EXPERTS))
    start = [item for own in operands for item in (own.hidden_states, own.indices, own.weights)]
    seen = [node for node in ancestors(start, is_mixer) if not is_mixer(node)]
    return frozenset(node for node in seen if node.target in _GAPS and _decides(node))


def _decides(node: fx.Node) -> bool:
    first = node.args[0]
    value = first.meta.get("val") if isinstance(first, fx.Node) else None
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return False
    if node.target not in _VALUES_AND_INDICES:
        return True
    # The values of a top-k change continuously when two scores swap places; its indices do not.
    return any(user.target is operator.getitem and user.args[1] == 1 and user.users for user in node.users)


def _independent(node: fx.Node) -> bool:
    """Whether `node` compares two values of which neither is computed from the other.

    A row's maximum, for example, is computed from the row. Independent values may be equal by chance in half precision.
    """
    sides = node.args[:2]
    if node.target in _VALUES_AND_INDICES or len(sides) < 2 or not all(isinstance(side, fx.Node) for side in sides):
        return False
    return not any(side in ancestors([other], is_mixer) for side, other in (sides, sides[::-1]))


class RouterWatch:
    """An observer of the interpreter that records ties and experts of every token.

    Args:
        program: The Program that will run.
        margin: `Tolerance.tie_margin`.
    """

    def __init__(self, program: Program, margin: float) -> None:
        self._margin = margin
        self._decisions = decision_nodes(program.graph)
        self._independent = frozenset(node for node in self._decisions if _independent(node))
        self._layers = {node: index for index, node in enumerate(program.nodes(EXPERTS))}
        self._experts = {row.index: row.num_experts for row in program.layers}
        self.begin(0, 0)

    def of_step(self, batch: int, length: int) -> RouterWatch:
        """A watch of the same Program without records, for a step of `batch` sequences of `length` tokens."""
        watch = copy.copy(self)
        watch.begin(batch, length)
        return watch

    def begin(self, batch: int, length: int) -> None:
        """Clear the records before a step of `batch` sequences of `length` tokens."""
        self._shape = (batch, length)
        self.tied = np.zeros((batch, length), dtype=bool)
        self.slots: dict[int, np.ndarray] = {}
        self._ranked: Tensor | None = None

    def __call__(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> None:
        """See `moec.compiler.ir.interpreter.Observer`."""
        if node in self._decisions:
            gaps = _GAPS[node.target](*args)
            if node in self._independent:
                gaps = torch.where(args[0] == args[1], 0.0, gaps)
            tokens = self._shape[0] * self._shape[1]
            if tokens and gaps.numel() % tokens == 0:
                tied = (gaps.reshape(tokens, -1) < self._margin).any(dim=1)
                self.tied |= tied.numpy().reshape(self._shape)
            if node.target in _VALUES_AND_INDICES:
                self._ranked = args[0]
        elif node.target is INDEXER:
            self.tied |= (_selection_gap(args, *result) < self._margin).numpy().reshape(self._shape)
        elif node in self._layers:
            self._note_cut(args[2])
            self._note_experts(node, args[1], args[2])

    def _note_cut(self, weights: Tensor) -> None:
        """Record ties of a policy that drops slots: between the last slot kept and the first one dropped."""
        tokens, scores = self._shape[0] * self._shape[1], self._ranked
        if scores is not None and scores.dim() == weights.dim() == 2 and len(scores) == len(weights) == tokens:
            tied = _cut_gap(scores.double(), (weights != 0).sum(-1)) < self._margin
            self.tied |= tied.numpy().reshape(self._shape)

    def _note_experts(self, node: fx.Node, indices: Tensor, weights: Tensor) -> None:
        layer = self._layers[node]
        # A family may pass each slot of a token as a row of its own, with the slots of a token in sequence (Llama 4).
        if indices.shape[0] % max(self._shape[0] * self._shape[1], 1):
            raise UnsupportedModelError(
                f"MoE layer {layer}: its experts see {indices.shape[0]} rows in a step of {self._shape}",
                hint="please report this model: its coverage cannot be established",
            )
        live = (weights != 0) & (indices >= 0) & (indices < self._experts[layer])
        self.slots[layer] = torch.where(live, indices, -1).to(torch.int32).numpy().reshape(*self._shape, -1)
