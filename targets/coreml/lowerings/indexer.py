"""`moec::indexer` over the cache that the states hold: scores of all slots, and a threshold that the largest reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.operands import Indexer
from moec.compiler.ir.program import INDEXER
from moec.targets.coreml.context import Context, Var
from moec.targets.coreml.lowerings.attention import visible
from moec.targets.coreml.lowerings.elementwise import Lowering, where
from moec.targets.coreml.lowerings.shape import cut


def _indexer(ctx: Context, node: fx.Node) -> Sequence[Var | None]:
    mb, own = ctx.mb, Indexer.of(node)
    keys = ctx.cache.states.update(ctx.cache.names[own.past_key], ctx.tensor(own.key))
    allowed = visible(ctx, own)
    if ctx.settings.context > own.top_k:
        scores = _scores(ctx, own, keys)
        lowest = ctx.tensor(float(np.finfo(np.float32).min), torch.float32)
        scores = where(ctx, allowed, scores, lowest, tuple(scores.shape))
        largest, _ = mb.topk(x=scores, k=np.int32(own.top_k), axis=3, ascending=False)
        threshold = cut(ctx, largest, 3, own.top_k - 1, own.top_k)
        allowed = mb.logical_and(x=allowed, y=mb.greater_equal(x=scores, y=threshold))
    # The present keys are the state; nothing but the output of the Program refers to them.
    return mb.squeeze(x=allowed, axes=ctx.ints(1)), None


def _scores(ctx: Context, own: Indexer, keys: Var) -> Var:
    """[1, 1, S, context] float32."""
    mb = ctx.mb
    query = mb.transpose(x=ctx.tensor(own.query, torch.float32), perm=ctx.ints(0, 2, 1, 3))
    products = mb.matmul(x=query, y=ctx.cast(keys, "fp32"), transpose_y=ctx.constant(True))
    scaled = mb.mul(x=mb.relu(x=products), y=ctx.tensor(own.scale, torch.float32))
    turned = mb.transpose(x=ctx.tensor(own.weights, torch.float32), perm=ctx.ints(0, 2, 1))
    weighted = mb.mul(x=scaled, y=mb.expand_dims(x=turned, axes=ctx.ints(3)))
    return mb.reduce_sum(x=weighted, axes=ctx.ints(1), keep_dims=True)


TABLE: Mapping[Any, Lowering] = {INDEXER: _indexer}
