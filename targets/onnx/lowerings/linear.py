"""Matrix products, with weights or between activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.weights import swap_last
from moec.quantize.lazy import Quantized
from moec.targets.common.arguments import result_dtype
from moec.targets.onnx.context import MS, Context, Lowering
from moec.targets.onnx.lowerings import standard_quantized
from moec.targets.onnx.lowerings.decoded import coded_product
from moec.targets.onnx.lowerings.fusions import joint_product

aten = torch.ops.aten


def _linear(ctx: Context, node: fx.Node) -> ir.Value:
    """`x @ weight.T + bias`; the weight is stored transposed, [in, out], unless another op uses it untransposed."""
    x, weight, bias = node.args
    assert isinstance(weight, fx.Node)
    dtype = result_dtype(node)
    product = _product(ctx, node, ctx.tensor(x, dtype), weight)
    return product if bias is None else ctx.op("Add", product, ctx.tensor(bias, dtype))


def _product(ctx: Context, node: fx.Node, x: ir.Value, weight: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    if weight.op != "get_attr":
        return ctx.op("MatMul", x, ctx.op("Transpose", ctx.tensor(weight, dtype), perm=[1, 0]))
    name = ctx.program.weights.resolve(str(weight.target))
    own = ctx.program.weights[name]
    if isinstance(own, Quantized):
        if not ctx.dialect.contrib:
            return standard_quantized.dequantized_product(ctx, node, x, name, own)
        return joint_product(ctx, node, x) or coded_product(ctx, x, {name: own}, dtype)
    if name in ctx.untransposed:
        # The weight is tied to the embedding: one copy serves both.
        value = ctx.weight(name, dtype)
        if ctx.dialect.contrib:
            return ctx.op("FusedMatMul", x, value, domain=MS, transB=1)
        return ctx.op("MatMul", x, ctx.op("Transpose", value, perm=[1, 0]))
    joint = joint_product(ctx, node, x)
    if joint is not None:
        return joint
    value = ctx.initializer(f"{name}.T", swap_last(own.cast(dtype)), half=ctx.stored_half(name))
    return ctx.op("MatMul", x, value)


def untransposed_weights(graph: fx.Graph, resolve: Any) -> frozenset[str]:
    """Weights of linears that other ops use too: tied embeddings."""
    linear: set[str] = set()
    other: set[str] = set()
    for node in graph.find_nodes(op="get_attr"):
        for user in node.users:
            as_weight = user.target is aten.linear.default and user.args[1] is node
            (linear if as_weight else other).add(resolve(str(node.target)))
    return frozenset(linear & other)


def _matmul(ctx: Context, node: fx.Node) -> ir.Value:
    left, right = node.args
    return ctx.op("MatMul", ctx.tensor(left), ctx.tensor(right))


TABLE: Mapping[Any, Lowering] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
}
