"""Experts in standard ops: slots sorted by expert, and two matrix products per expert over its own rows.

A slot is one of the k experts that the router selected for a token; there are T * k of them.

Every expert is a pair of constant matrices, which ONNX Runtime packs once, when the model is loaded. The `MoE` kernel
packs them at every call, which costs a third of a prefill. An expert without tokens costs two products of no rows,
which return at once. All other steps run once for all experts. Quantized experts take this form where `QMoE` cannot
compute them: their products are `MatMulNBits`, which also returns at once without rows.

```
experts, slots = NonZero(expert of a slot is e, [E, T * k])  # sorted by expert, since NonZero goes row by row
rows           = Gather(x, slots / k)                        # [N, H], N = slots that were kept
each expert    : Split(rows, counts)[e] @ gate_up[e]
activation     over all rows
each expert    : Split(rows, counts)[e] @ down[e], after one row of zeros
place          = ScatterElements of 1, 2, .. N at slots      # [T * k], 0 where the slot was dropped
weights [T, 1, k] @ Gather(rows, place) [T, k, H]
```

No scatter adds: adding to one row from several threads loses updates in ONNX Runtime
(microsoft/onnxruntime#18048, #23396). The scatter writes each element once, and a matrix product does the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.derived_weights import Member
from moec.compiler.ir.experts import Gate
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.weights import LazyTensor, swap_last
from moec.quantize.lazy import Quantized
from moec.targets.common.arguments import result_dtype
from moec.targets.common.gate import gated
from moec.targets.onnx.context import DTYPES, Context, np_dtype
from moec.targets.onnx.lowerings import decoded
from moec.targets.onnx.lowerings.quantized import Product, product_with


def grouped(ctx: Context, node: fx.Node, gate: Gate) -> ir.Value:
    """Lower an experts node as the module's docstring describes.

    Args:
        ctx: The lowering.
        node: The experts node; slots whose weight is exactly 0 are skipped.
        gate: The activation of its experts.

    Returns:
        [T, H] in the dtype of the node.
    """
    own, dtype = Experts.of(node), result_dtype(node)
    x, weights = ctx.tensor(own.hidden_states), ctx.tensor(own.weights, dtype)
    slots = _Slots.sort(ctx, node, weights)
    rows = ctx.op("Gather", x, slots.tokens(ctx, node), axis=0)
    rows = ctx.op("Concat", *_products(ctx, rows, slots.counts, own.gate_up_proj), axis=0)
    if own.gate_up_bias is not None:
        rows = ctx.op("Add", rows, _biases(ctx, own.gate_up_bias, slots))
    products = _products(ctx, activate(ctx, rows, gate, dtype), slots.counts, own.down_proj)
    if own.down_bias is not None:
        products = [ctx.op("Add", ctx.op("Concat", *products, axis=0), _biases(ctx, own.down_bias, slots))]
    nothing = ctx.constant(np.zeros((1, own.hidden_size), np_dtype(dtype)))
    rows = ctx.op("Concat", nothing, *products, axis=0)
    return _weighted_sum(ctx, rows, slots.places(ctx), weights, dtype)


@dataclass(frozen=True)
class _Slots:
    """The slots of a layer, sorted by expert.

    Attributes:
        order: The kept slots, sorted by expert, [N] of 0 .. T * k - 1.
        experts: The expert of each kept slot, [N].
        counts: Number of kept slots per expert, [E].
        live: The expert of every slot, or -1 where it was dropped, [1, T * k].
    """

    order: ir.Value
    experts: ir.Value
    counts: ir.Value
    live: ir.Value

    @classmethod
    def sort(cls, ctx: Context, node: fx.Node, weights: ir.Value) -> _Slots:
        """Sort the slots of an experts node by expert.

        A slot is dropped where its weight is 0 or its index is not that of an expert.
        """
        operands = Experts.of(node)
        used = ctx.op("Cast", weights, to=int(ir.DataType.BOOL))
        indices = ctx.tensor(operands.indices, torch.int64)
        live = ctx.op("Reshape", ctx.op("Where", used, indices, ctx.constant(np.int64(-1))), ctx.ints(1, -1))
        own = ctx.op("Equal", live, ctx.constant(np.arange(operands.num_experts, dtype=np.int64)[:, None]))
        counts = ctx.op("ReduceSum", ctx.op("Cast", own, to=int(ir.DataType.INT64)), ctx.ints(1), keepdims=0)
        places = ctx.op("NonZero", own)
        experts, order = (ctx.op("Gather", places, ctx.constant(np.int64(axis)), axis=0) for axis in (0, 1))
        return cls(order, experts, counts, live)

    def tokens(self, ctx: Context, node: fx.Node) -> ir.Value:
        """Token of each kept slot, [N]."""
        width = Experts.of(node).top_k
        return self.order if width == 1 else ctx.op("Div", self.order, ctx.constant(np.int64(width)))

    def places(self, ctx: Context) -> ir.Value:
        """Row of each slot among the results, [T * k]: 1 .. N, or 0 where it was dropped."""
        one = ctx.constant(np.int64(1))
        numbers = ctx.op("Range", one, ctx.op("Add", ctx.op("Size", self.order), one), one)
        empty = ctx.op("Mul", ctx.op("Reshape", self.live, ctx.ints(-1)), ctx.constant(np.int64(0)))
        return ctx.op("ScatterElements", empty, self.order, numbers, axis=0)


def _weighted_sum(ctx: Context, rows: ir.Value, places: ir.Value, weights: ir.Value, dtype: torch.dtype) -> ir.Value:
    """The weighted sum of each token's rows over its slots, [T, H], computed in float32 as in the reference."""
    if dtype != torch.float32:
        rows, weights = (ctx.op("Cast", value, to=int(ir.DataType.FLOAT)) for value in (rows, weights))
    own = ctx.op("Gather", rows, ctx.op("Reshape", places, ctx.op("Shape", weights)), axis=0)
    total = ctx.op("Squeeze", ctx.op("MatMul", ctx.op("Unsqueeze", weights, ctx.ints(1)), own), ctx.ints(1))
    return total if dtype == torch.float32 else ctx.op("Cast", total, to=int(DTYPES[dtype]))


def _products(ctx: Context, rows: ir.Value, counts: ir.Value, stack: fx.Node) -> list[ir.Value]:
    """Each expert's rows of [N, K] times its matrix: one [n, M] for each expert, where the n sum to N."""
    name = ctx.program.weights.resolve(str(stack.target))
    stored = ctx.program.weights[name]
    if isinstance(stored, Quantized):
        products = decoded.expert_products(ctx, name, stored, stack.meta["val"].dtype)
    else:
        products = _float_products(ctx, name, ctx.lazy(stack))
    if len(products) == 1:
        return [products[0](rows)]
    parts = ctx.ops("Split", rows, counts, outputs=len(products), axis=0)
    return [product(part) for product, part in zip(products, parts, strict=True)]


def _float_products(ctx: Context, name: str, tensor: LazyTensor) -> list[Product]:
    half = ctx.stored_half(name) and tensor.dtype is torch.float32
    ctx.experts[name] = {"per_expert": f"{name}.{{}}" + (".fp16" if half else ""), "transposed": True}
    matrices = [
        ctx.initializer(f"{name}.{index}", swap_last(Member(tensor, index)), half=half)
        for index in range(tensor.shape[0])
    ]
    return [product_with(ctx, matrix) for matrix in matrices]


def _biases(ctx: Context, stack: fx.Node, slots: _Slots) -> ir.Value:
    """The bias of each row's expert: [N, M]."""
    name = ctx.program.weights.resolve(str(stack.target))
    ctx.experts[name] = {"initializer": name, "interleaved": False, "transposed": False}
    return ctx.op("Gather", ctx.tensor(stack), slots.experts, axis=0)


def activate(ctx: Context, projected: ir.Value, gate: Gate, dtype: torch.dtype) -> ir.Value:
    """Apply `gate` to `projected` [..., 2I] ([..., I] if ungated) -> [..., I]."""
    if not gate.gated:
        parts = [projected]
    elif gate.interleaved:
        step, end = ctx.ints(2), ctx.ints(np.iinfo(np.int64).max)
        parts = [ctx.op("Slice", projected, ctx.ints(start), end, ctx.ints(-1), step) for start in (0, 1)]
    else:
        parts = list(ctx.ops("Split", projected, outputs=2, axis=-1, num_outputs=2))
    return gated(_Functions(ctx, dtype), gate, parts)


@dataclass(frozen=True)
class _Functions:
    """See `moec.targets.common.gate.Functions`."""

    ctx: Context
    dtype: torch.dtype

    def unary(self, name: str, x: ir.Value) -> ir.Value:
        match name:
            case "silu":
                return self.ctx.op("Mul", x, self.ctx.op("Sigmoid", x))
            case "gelu_tanh":
                return self.ctx.op("Gelu", x, approximate="tanh")
            case _:
                return self.ctx.op(name.capitalize(), x)

    def binary(self, name: str, x: ir.Value, y: ir.Value | float) -> ir.Value:
        if name == "clip":
            assert isinstance(y, int | float)
            return self.ctx.op("Clip", x, self._constant(-y), self._constant(y))
        return self.ctx.op(name.capitalize(), x, self._constant(y) if isinstance(y, int | float) else y)

    def _constant(self, value: float) -> ir.Value:
        return self.ctx.constant(np.asarray(value, np_dtype(self.dtype)))
