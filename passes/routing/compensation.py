"""Compensation: a cheap stand-in for the experts that a policy drops, added to the output of those that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.operands import Experts, Select
from moec.compiler.ir.program import EXPERTS, SELECT, Program, module_of
from moec.passes.base import Pass, PassResult
from moec.passes.decompose.decompose import decompose
from moec.passes.rewriting import aten, is_call, rewritten
from moec.passes.routing.inserter import Inserter


@dataclass(frozen=True, eq=False)
class Compensation:
    """What stands in for the dropped experts of one MoE layer.

    With d_ti the routing weight of a dropped slot i of token t, e_ti its expert, and d_t the sum of the d_ti,

        sum_i d_ti m_(e_ti)  +  d_t (x_t A) B.

    m_e approximates the mean output of expert e, and the second term the part of the missing outputs that is linear in
    the hidden state x_t. `calibrate.compensation` fits all three by least squares. A token that drops nothing gets
    exactly nothing.

    Attributes:
        table: m, [E, H] float32.
        down: A, [H, r] float32.
        up: B, [r, H] float32.
        top_k: k, the number of slots of a token.
    """

    table: Tensor
    down: Tensor
    up: Tensor
    top_k: int

    def without(self, removed: tuple[int, ...]) -> Compensation:
        """The compensation of a layer from which experts are pruned."""
        kept = [index for index in range(len(self.table)) if index not in removed]
        return replace(self, table=self.table[kept])

    @property
    def work(self) -> int:
        """Multiplications per token; a token without dropped slots takes as many."""
        return work(self.top_k, self.table.shape[1], self.down.shape[1])

    def of(self, hidden: Tensor, indices: Tensor, dropped: Tensor) -> Tensor:
        """The term that is added.

        Args:
            hidden: [T, H], the input of the experts.
            indices: [T, k] integers, the expert of each slot; values outside the experts are padding.
            dropped: [T, k], the routing weight of each dropped slot, 0 for the others.

        Returns:
            [T, H] in the dtype of `hidden`.
        """
        return added(hidden, indices, dropped, self.table, self.down, self.up)


def added(hidden: Tensor, indices: Tensor, dropped: Tensor, table: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """See `Compensation`: the reference, which is also traced into the graph."""
    own = dropped.to(hidden.dtype)
    rows = table[torch.where(dropped > 0, indices, 0)]
    means = (rows * own.unsqueeze(-1)).sum(1)
    return means + torch.matmul(torch.matmul(hidden, down) * own.sum(-1, keepdim=True), up)


def work(top_k: int, hidden: int, rank: int) -> int:
    """Multiplications that a compensation adds per token: its mean outputs, and the two products."""
    return hidden * (top_k + 2 * rank) + rank


def size(experts: int, hidden: int, rank: int) -> int:
    """Numbers that a compensation stores."""
    return hidden * (experts + 2 * rank)


@dataclass(frozen=True)
class CompensateDropped(Pass):
    """Add to the output of the experts what stands in for those that a policy drops; see `Compensation`.

    ```
    %selected = moec.select(%weights, %keep, False)
    %y = experts(%x, %indices, %selected, ...)
    ->
    %dropped = where(%keep, 0, %weights)
    %rows = index(@table, [where(gt(%dropped, 0), %indices, 0)])              # [T, k, H]
    %means = sum(mul(%rows, unsqueeze(%dropped, -1)), [1])                    # [T, H]
    %linear = matmul(mul(matmul(%x, @down), sum(%dropped, [1], True)), @up)   # [T, H]
    %y = experts(%x, %indices, %selected, ...)
    %sum = add(%y, add(%means, %linear))
    ```

    Attributes:
        layers: One compensation per MoE layer, or None.
    """

    name: ClassVar[str] = "compensate-dropped"
    requires: ClassVar[tuple[str, ...]] = ("dynamic-routing",)

    layers: tuple[Compensation | None, ...]

    def run(self, program: Program) -> PassResult:
        """See the class."""
        graph = program.copy_graph()
        inserter, rejections = Inserter(program, graph), []
        pairs = zip(graph.find_nodes(op="call_function", target=EXPERTS), self.layers, strict=True)
        for experts, own in pairs:
            if own is None:
                continue
            if not is_call(Experts.of(experts).weights, SELECT):
                rejections.append(Rejection(self.name, module_of(experts), "its policy drops no slot"))
                continue
            _insert(inserter, experts, own)
        if not inserter.modified:
            return PassResult(program, modified=False, rejections=tuple(rejections))
        decompose(inserter.added)
        changed = rewritten(program, graph, program.weights.with_tensors(inserter.constants))
        return PassResult(changed, True, tuple(rejections))


def _insert(inserter: Inserter, experts: fx.Node, own: Compensation) -> None:
    operands, select = Experts.of(experts), Select.of(Experts.of(experts).weights)
    hidden = operands.hidden_states
    tensors = [part.to(hidden.meta["val"].dtype) for part in (own.table, own.down, own.up)]
    values = [node.meta["val"] for node in (hidden, operands.indices, select.weights, select.keep)]

    def rule(x: Tensor, indices: Tensor, weights: Tensor, keep: Tensor, *parts: Tensor) -> Tensor:
        return added(x, indices, torch.where(keep, 0.0, weights).clamp(min=0.0), *parts)

    traced = make_fx(rule, tracing_mode="fake", _allow_non_fake_inputs=True)(*values, *tensors)
    traced.graph.eliminate_dead_code()
    inserter.begin(experts, "compensate")
    term = inserter.splice(traced.graph, [hidden, operands.indices, select.weights, select.keep, *tensors])
    users = list(experts.users)
    after = experts.next
    inserter.begin(after, "compensate")
    total = inserter.call(aten.add.Tensor, experts, term)
    for user in users:
        user.replace_input_with(experts, total)
