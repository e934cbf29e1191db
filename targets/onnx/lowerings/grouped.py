"""Experts in standard ops: tokens sorted by expert, and two matrix products per expert over its own rows.

Every expert is a pair of constant matrices, which ONNX Runtime packs once for its matrix product; the `MoE` kernel
packs them at every call, which costs a third of a prefill. An idle expert is a product of no rows, so it costs two
nodes that return at once. All else is done once for all experts.

```
experts, tokens = NonZero(routing weights [E, T])     # sorted by expert, since NonZero goes row by row
rows            = Gather(x, tokens)                   # [N, H], N = slots that were kept
each expert     : Split(rows, counts)[e] @ gate_up[e]
activation      over all rows
each expert     : Split(rows, counts)[e] @ down[e]
ScatterND(add) of rows * weights at tokens
```
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from moec.compiler.ops import Gate
from moec.compiler.weights import LazyTensor, swap_last
from moec.targets.onnx.context import DTYPES, Context, np_dtype, result_dtype


def grouped(ctx: Context, node: fx.Node, gate: Gate, dense: ir.Value) -> ir.Value:
    """Lower an experts node; see the module.

    Args:
        ctx: The graph so far.
        node: The experts node.
        gate: Its activation.
        dense: Routing weights [T, E]; a slot that is exactly 0 takes no part.

    Returns:
        [T, H] in the dtype of the node.
    """
    hidden, (gate_up, gate_up_bias, down, down_bias) = node.args[0], node.args[3:7]
    x, dtype = ctx.tensor(hidden), result_dtype(node)
    by_expert = ctx.op("Transpose", dense, perm=[1, 0])
    kept = ctx.op("Cast", by_expert, to=int(ir.DataType.BOOL))
    counts = ctx.op("ReduceSum", ctx.op("Cast", kept, to=int(ir.DataType.INT64)), ctx.ints(1), keepdims=0)
    places = ctx.op("NonZero", kept)
    experts, tokens = (ctx.op("Gather", places, ctx.constant(np.int64(axis)), axis=0) for axis in (0, 1))
    rows = ctx.op("Gather", x, tokens, axis=0)
    rows = _products(ctx, node, rows, counts, gate_up)
    if gate_up_bias is not None:
        rows = ctx.op("Add", rows, _biases(ctx, gate_up_bias, experts))
    rows = _products(ctx, node, activate(ctx, rows, gate, dtype), counts, down)
    if down_bias is not None:
        rows = ctx.op("Add", rows, _biases(ctx, down_bias, experts))
    weights = ctx.op("GatherND", by_expert, ctx.op("Transpose", places, perm=[1, 0]))
    rows = ctx.op("Mul", rows, ctx.op("Unsqueeze", weights, ctx.ints(1)))
    # Sums are float32, as in the reference; ONNX Runtime on CPU adds in ScatterND for nothing narrower.
    if dtype != torch.float32:
        rows = ctx.op("Cast", rows, to=int(ir.DataType.FLOAT))
    zeros = ctx.op("ConstantOfShape", ctx.op("Shape", x), value=ir.Tensor(np.zeros(1, np.float32)))
    total = ctx.op("ScatterND", zeros, ctx.op("Unsqueeze", tokens, ctx.ints(1)), rows, reduction="add")
    return total if dtype == torch.float32 else ctx.op("Cast", total, to=int(DTYPES[dtype]))


def _products(ctx: Context, node: fx.Node, rows: ir.Value, counts: ir.Value, stack: Any) -> ir.Value:
    """Each expert's rows times its matrix: [N, K] -> [N, M]."""
    tensor, transposed = ctx.lazy(stack), bool(node.args[10])
    name = ctx.program.weights.resolve(str(stack.target))
    half = ctx.stored_half(name) and tensor.dtype is torch.float32
    ctx.experts[name] = {"per_expert": f"{name}.{{}}" + (".fp16" if half else ""), "transposed": not transposed}
    matrices = []
    for index in range(tensor.shape[0]):
        row = _Row(tensor, index)
        matrices.append(ctx.initializer(f"{name}.{index}", row if transposed else swap_last(row), half=half))
    if len(matrices) == 1:
        return ctx.op("MatMul", rows, matrices[0])
    parts = ctx.ops("Split", rows, counts, outputs=len(matrices), axis=0)
    products = [ctx.op("MatMul", part, matrix) for part, matrix in zip(parts, matrices, strict=True)]
    return ctx.op("Concat", *products, axis=0)


def _biases(ctx: Context, stack: Any, experts: ir.Value) -> ir.Value:
    """The bias of each row's expert: [N, M]."""
    name = ctx.program.weights.resolve(str(stack.target))
    ctx.experts[name] = {"initializer": name, "interleaved": False, "transposed": False}
    return ctx.op("Gather", ctx.tensor(stack), experts, axis=0)


class _Row(LazyTensor):
    """One expert of a stack."""

    def __init__(self, stack: LazyTensor, index: int) -> None:
        self._stack, self._index = stack, index
        self.shape, self.dtype = stack.shape[1:], stack.dtype

    def read(self) -> Tensor:
        return self._stack.rows(self._index, self._index + 1)[0]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]


def activate(ctx: Context, projected: ir.Value, gate: Gate, dtype: torch.dtype) -> ir.Value:
    """`gate` of `projected` [..., 2I] (or [..., I] without a gate)."""

    def constant(value: float) -> ir.Value:
        return ctx.constant(np.asarray(value, np_dtype(dtype)))

    if not gate.gated:
        return _activation(ctx, projected, gate)
    if gate.interleaved:
        step, end = ctx.ints(2), ctx.ints(np.iinfo(np.int64).max)
        first, up = (ctx.op("Slice", projected, ctx.ints(start), end, ctx.ints(-1), step) for start in (0, 1))
    else:
        first, up = ctx.ops("Split", projected, outputs=2, axis=-1, num_outputs=2)
    if gate.limit:
        first = ctx.op("Min", first, constant(gate.limit))
        up = ctx.op("Clip", up, constant(-gate.limit), constant(gate.limit))
    if gate.activation == "silu" and gate.alpha != 1.0:
        activated = ctx.op("Mul", first, ctx.op("Sigmoid", ctx.op("Mul", first, constant(gate.alpha))))
    else:
        activated = _activation(ctx, first, gate)
    return ctx.op("Mul", activated, ctx.op("Add", up, constant(gate.up_offset)) if gate.up_offset else up)


def _activation(ctx: Context, x: ir.Value, gate: Gate) -> ir.Value:
    match gate.activation:
        case "silu":
            return ctx.op("Mul", x, ctx.op("Sigmoid", x))
        case "gelu":
            return ctx.op("Gelu", x)
        case "gelu_tanh":
            return ctx.op("Gelu", x, approximate="tanh")
        case "relu2":
            positive = ctx.op("Relu", x)
            return ctx.op("Mul", positive, positive)
        case "identity":
            return x
        case name:
            return ctx.op({"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}[name], x)
