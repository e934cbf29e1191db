"""`moec::indexer` in standard ops: scores of all tokens, and a threshold that the largest of them reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.operands import Indexer
from moec.compiler.ir.program import INDEXER
from moec.targets.onnx.context import Context, Lowering
from moec.targets.onnx.lowerings.attention import total_length, visible


def _indexer(ctx: Context, node: fx.Node) -> Sequence[ir.Value]:
    own = Indexer.of(node)
    allowed = visible(ctx, own)
    keys = ctx.op("Concat", ctx.tensor(own.past_key), ctx.tensor(own.key), axis=2)
    scores = ctx.op("Where", allowed, _scores(ctx, own, keys), ctx.constant(np.finfo(np.float32).min))
    count = ctx.op("Min", total_length(ctx, own), ctx.constant(np.int64(own.top_k)))
    largest, _ = ctx.ops("TopK", scores, ctx.op("Reshape", count, ctx.ints(1)), outputs=2, axis=-1)
    threshold = ctx.op("Slice", largest, ctx.ints(-1), ctx.ints(np.iinfo(np.int64).max), ctx.ints(3))
    selected = ctx.op("And", allowed, ctx.op("GreaterOrEqual", scores, threshold))
    return ctx.op("Squeeze", selected, ctx.ints(1)), keys


def _scores(ctx: Context, own: Indexer, keys: ir.Value) -> ir.Value:
    """[B, 1, S, T] float32."""
    query = ctx.op("Transpose", ctx.tensor(own.query, torch.float32), perm=[0, 2, 1, 3])
    wide = keys if own.key.meta["val"].dtype == torch.float32 else ctx.op("Cast", keys, to=int(ir.DataType.FLOAT))
    products = ctx.op("MatMul", query, ctx.op("Transpose", wide, perm=[0, 1, 3, 2]))
    scaled = ctx.op("Mul", ctx.op("Relu", products), ctx.constant(np.float32(own.scale)))
    turned = ctx.op("Transpose", ctx.tensor(own.weights, torch.float32), perm=[0, 2, 1])
    weighted = ctx.op("Mul", scaled, ctx.op("Unsqueeze", turned, ctx.ints(3)))
    return ctx.op("ReduceSum", weighted, ctx.ints(1), keepdims=1)


TABLE: Mapping[Any, Lowering] = {INDEXER: _indexer}
