"""`moec::experts` and `moec::select`.

Each expert is an IF whose branch holds the expert's weights as constants: an expert without tokens costs a comparison,
and its weights are not read. Without control flow, every expert is computed for all tokens, and the results for
tokens that did not select it are masked out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.experts import Gate
from moec.compiler.ir.operands import Experts, Select
from moec.compiler.ir.program import EXPERTS, SELECT
from moec.targets.common.arguments import result_dtype
from moec.targets.common.gate import gated
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.lowerings.elementwise import Lowering, choose
from moec.targets.tflite.lowerings.linear import fully_connected
from moec.targets.tflite.lowerings.shape import one_hot
from moec.targets.tflite.model import Graph, Value


def _experts(ctx: Context, node: fx.Node) -> Value:
    own = Experts.of(node)
    x, count = ctx.tensor(own.hidden_states, result_dtype(node)), own.num_experts
    dense = _dense_weights(ctx, own)
    columns = _unpack(ctx, ctx.reshape(ctx.transpose(dense, (1, 0)), (count, x.shape[0], 1)))
    total = ctx.constant(np.zeros(x.shape, np.float32))
    if not ctx.settings.branches:
        for index, column in enumerate(columns):
            total = _expert(ctx, node, index, x, column, total)
        return total
    hits = ctx.op("NOT_EQUAL", dense, ctx.scalar(0.0), dtype="BOOL")
    for index, hit in enumerate(_unpack(ctx, ctx.reduce("REDUCE_ANY", hits, [0], keep=False))):
        branches = (_branch(ctx, node, index, x), _idle(ctx, x))
        operands = [hit, x, columns[index], total]
        (total,) = ctx.graph.op("IF", operands, [(x.shape, x.dtype)], branches=branches)
    return total


def _dense_weights(ctx: Context, own: Experts) -> Value:
    """Routing weights as [T, E]: 0 for every expert that was not selected for a token."""
    indices, weights = ctx.tensor(own.indices, torch.int64), ctx.tensor(own.weights, torch.float32)
    column, hot = ctx.reshape(weights, (*weights.shape, 1)), one_hot(ctx, indices, own.num_experts)
    return ctx.reduce("SUM", choose(ctx, hot, column, ctx.scalar(0.0)), [1], keep=False)


def _unpack(ctx: Context, value: Value) -> list[Value]:
    outputs = [(value.shape[1:], value.dtype)] * value.shape[0]
    return ctx.graph.op("UNPACK", [value], outputs, {"num": value.shape[0], "axis": 0})


def _operands(graph: Graph, x: Value) -> list[Value]:
    tokens = x.shape[0]
    shapes = {"hidden_states": x.shape, "weight": (tokens, 1), "total": x.shape}
    return [graph.input(name, shape, "FLOAT32") for name, shape in shapes.items()]


def _branch(ctx: Context, node: fx.Node, index: int, x: Value) -> Graph:
    inner = ctx.branch(f"{node.name}.{index}")
    own, weight, total = _operands(inner.graph, x)
    inner.graph.output("total", _expert(inner, node, index, own, weight, total))
    return inner.graph


def _idle(ctx: Context, x: Value) -> Graph:
    """The branch that returns its running total unchanged, for experts without tokens; all of one size share it."""
    if x.shape not in ctx.shared.idle:
        graph = ctx.shared.idle[x.shape] = Graph("idle")
        graph.output("total", _operands(graph, x)[2])
    return ctx.shared.idle[x.shape]


def _expert(ctx: Context, node: fx.Node, index: int, x: Value, weight: Value, total: Value) -> Value:
    """`total + weight * expert(x)`; tokens of weight 0 keep their total even if the expert computes NaN for them."""
    own = Experts.of(node)
    first = own.gated and own.interleaved
    projected = _project(ctx, node, index, x, (own.gate_up_proj, own.gate_up_bias), interleaved=first)
    activated = activate(ctx, projected, own.gate)
    result = _project(ctx, node, index, activated, (own.down_proj, own.down_bias), interleaved=False)
    added = ctx.op("ADD", total, ctx.op("MUL", result, weight))
    if ctx.settings.branches and x.shape[0] == 1:
        return added
    used = ctx.op("NOT_EQUAL", weight, ctx.scalar(0.0), dtype="BOOL")
    return choose(ctx, used, added, total)


def _project(
    ctx: Context,
    node: fx.Node,
    index: int,
    x: Value,
    stacks: tuple[fx.Node, fx.Node | None],
    *,
    interleaved: bool,
) -> Value:
    """One projection of expert `index`; `stacks` are the nodes of all experts' matrices and of their biases, if any."""
    made = []
    for source in stacks:
        if source is None:
            continue
        if source.op != "get_attr":
            raise refuse(node, "expert weights that are computed in the graph are not supported")
        name, dtype = str(source.target), source.meta["val"].dtype
        made.append(ctx.shared.weights.expert(name, index, dtype, interleaved=interleaved))
        entry = {"transposed": False, "interleaved": interleaved}
        ctx.shared.experts[ctx.shared.program.weights.resolve(name)] = entry
    bias = ctx.float32(ctx.graph.weight(made[1])) if len(made) > 1 else None
    return fully_connected(ctx, x, made[0], bias)


def activate(ctx: Context, projected: Value, gate: Gate) -> Value:
    """Apply `gate` to `projected` [T, 2I] (gate, then up; [T, I] if ungated) -> [T, I]."""
    parts = ctx.split(projected, [projected.shape[1] // 2] * 2, 1) if gate.gated else [projected]
    return gated(_Functions(ctx), gate, parts)


@dataclass(frozen=True)
class _Functions:
    """See `moec.targets.common.gate.Functions`."""

    ctx: Context

    def unary(self, name: str, x: Value) -> Value:
        match name:
            case "silu":
                return self.ctx.op("MUL", x, self.ctx.op("LOGISTIC", x))
            case "gelu" | "gelu_tanh":
                return self.ctx.op("GELU", x, approximate=name == "gelu_tanh")
            case _:
                return self.ctx.op({"sigmoid": "LOGISTIC"}.get(name, name.upper()), x)

    def binary(self, name: str, x: Value, y: Value | float) -> Value:
        if name == "clip":
            assert isinstance(y, int | float)
            return self.ctx.op("MINIMUM", self.ctx.op("MAXIMUM", x, self.ctx.scalar(-y)), self.ctx.scalar(y))
        kind = {"min": "MINIMUM"}.get(name, name.upper())
        return self.ctx.op(kind, x, self.ctx.scalar(y) if isinstance(y, int | float) else y)


def _select(ctx: Context, node: fx.Node) -> Value:
    """`moec::select`: zero the dropped slots and, with `renormalize`, scale the others to the sum of the row."""
    own = Select.of(node)
    value = ctx.tensor(own.weights, torch.float32)
    kept = choose(ctx, ctx.tensor(own.keep, torch.bool), value, ctx.scalar(0.0))
    if not own.renormalize:
        return kept
    before, after = (ctx.reduce("SUM", item, [1], keep=True) for item in (value, kept))
    safe = ctx.op("MAXIMUM", after, ctx.scalar(torch.finfo(torch.float32).tiny))
    return ctx.op("MUL", kept, ctx.op("DIV", before, safe))


TABLE: Mapping[Any, Lowering] = {EXPERTS: _experts, SELECT: _select}
