"""`moec::indexer` over a cache of fixed capacity: scores of all slots, and a threshold that the largest reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from moec.compiler.ir.operands import Indexer
from moec.compiler.ir.program import INDEXER
from moec.targets.common.arguments import shape_of
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.lowerings.attention import updated, visible
from moec.targets.tflite.lowerings.elementwise import Lowering, choose
from moec.targets.tflite.lowerings.linear import batch_matmul
from moec.targets.tflite.lowerings.reduce import largest
from moec.targets.tflite.model import Value

LOWEST = -3.0e38
"""Below every score, and finite."""


def _indexer(ctx: Context, node: fx.Node) -> Sequence[Value]:
    own = Indexer.of(node)
    if own.attention_mask is not None:
        raise refuse(node, "an indexer with a padding mask is not supported")
    allowed, keys = visible(ctx, own), updated(ctx, own.past_key, own.key, own.cache_position)
    length, capacity = allowed.shape
    if capacity > own.top_k:
        scores = choose(ctx, allowed, _scores(ctx, own, keys), ctx.scalar(LOWEST))
        values, _ = largest(ctx, scores, own.top_k)
        reached = ctx.op("GREATER_EQUAL", scores, ctx.slice(values, 1, own.top_k - 1, 1), dtype="BOOL")
        allowed = ctx.op("LOGICAL_AND", allowed, reached)
    return ctx.reshape(allowed, (1, length, capacity)), keys


def _scores(ctx: Context, own: Indexer, keys: Value) -> Value:
    """[S, capacity]."""
    _, length, heads, width = shape_of(own.query)
    capacity = keys.shape[2]
    query = ctx.reshape(ctx.op("MUL", ctx.tensor(own.query), ctx.scalar(own.scale)), (1, 1, length * heads, width))
    products = ctx.op("RELU", batch_matmul(ctx, query, keys, transposed=True))
    weights = ctx.reshape(ctx.tensor(own.weights), (length, 1, heads))
    scores = batch_matmul(ctx, weights, ctx.reshape(products, (length, heads, capacity)))
    return ctx.reshape(scores, (length, capacity))


TABLE: Mapping[Any, Lowering] = {INDEXER: _indexer}
