"""Matrix products, with weights or between activations, and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import node_of, result_dtype
from moec.targets.common.refusals import refuse
from moec.targets.tflite.context import Context
from moec.targets.tflite.lowerings.elementwise import Lowering
from moec.targets.tflite.model import Value, Weight

aten = torch.ops.aten


def fully_connected(ctx: Context, x: Value, weight: Weight | Value, bias: Value | None) -> Value:
    """`x @ weight.T + bias`; a weight that is not `dynamic` is first dequantized to float32, once for all calls.

    A kernel that rounds activations takes only a constant as its bias, and so not one that is stored in half precision.
    """
    matrix = weight if isinstance(weight, Value) else ctx.graph.weight(weight)
    rounds = isinstance(weight, Weight) and weight.dynamic
    if isinstance(weight, Weight) and not rounds:
        matrix = ctx.float32(matrix)
    shape = (*x.shape[:-1], matrix.shape[0])
    if bias is None or not rounds or ctx.graph.is_constant(bias):
        return ctx.op("FULLY_CONNECTED", x, matrix, bias, shape=shape, keepNumDims=True)
    return ctx.op("ADD", ctx.op("FULLY_CONNECTED", x, matrix, None, shape=shape, keepNumDims=True), bias)


def _linear(ctx: Context, node: fx.Node) -> Value:
    x, weight, bias = node.args
    dtype = result_dtype(node)
    own = None if bias is None else ctx.tensor(bias, dtype)
    source = node_of(weight)
    matrix = ctx.tensor(source) if source.op != "get_attr" else ctx.shared.weights.matrix(str(source.target), dtype)
    return fully_connected(ctx, ctx.tensor(x, dtype), matrix, own)


def batch_matmul(ctx: Context, left: Value, right: Value, *, transposed: bool = False) -> Value:
    """`left @ right`, or `left @ right.mT` if `transposed`."""
    batch = _broadcast(left.shape[:-2], right.shape[:-2])
    width = right.shape[-2 if transposed else -1]
    return ctx.op("BATCH_MATMUL", left, right, shape=(*batch, left.shape[-2], width), adjX=False, adjY=transposed)


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.broadcast_shapes(left, right))


def _matmul(ctx: Context, node: fx.Node) -> Value:
    left, right = node.args
    return batch_matmul(ctx, ctx.tensor(left), ctx.tensor(right))


def _embedding(ctx: Context, node: fx.Node) -> Value:
    """Rows of an embedding; rows of a quantized one are dequantized as they are looked up."""
    table, index = node_of(node.args[0]), ctx.tensor(node.args[1], torch.int64)
    if table.op != "get_attr":
        return ctx.gather(ctx.tensor(table), index, 0)
    weight = ctx.shared.weights.matrix(str(table.target), result_dtype(node))
    ctx.shared.tables.add(weight.name)
    if ctx.settings.legacy:
        # tflite-runtime can look up neither fp16 nor quantized rows, so the whole table is dequantized first.
        return ctx.gather(ctx.float32(ctx.graph.weight(weight)), index, 0)
    if not weight.block:
        rows = ctx.gather(ctx.graph.weight(weight), index, 0)
        return ctx.op("DEQUANTIZE", rows, dtype="FLOAT32") if rows.dtype == "FLOAT16" else rows
    if weight.blockwise:
        reason = f"{weight.name}: an embedding quantized in blocks is not supported"
        raise refuse(node, reason, "use int8:channel for embeddings")
    flat = ctx.reshape(index, (-1,) if index.rank == 1 else (_size(index.shape),))
    rows = ctx.op(
        "EMBEDDING_LOOKUP", flat, ctx.graph.weight(weight), shape=(flat.shape[0], weight.shape[1]), dtype="FLOAT32"
    )
    return ctx.reshape(rows, (*index.shape, weight.shape[1]))


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


TABLE: Mapping[Any, Lowering] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.embedding.default: _embedding,
}
