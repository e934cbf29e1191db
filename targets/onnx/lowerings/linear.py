"""Matrix products with weights and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.weights import swap_last
from moec.targets.onnx.context import MS, Context, result_dtype
from moec.targets.onnx.lowerings.elementwise import Lowering

aten = torch.ops.aten


def _linear(ctx: Context, node: fx.Node) -> ir.Value:
    """`x @ weight.T + bias`; the weight is stored [in, out], as the kernels want it, unless others need it as it is."""
    x, weight, bias = [*node.args, None][:3]
    assert isinstance(weight, fx.Node)
    dtype = result_dtype(node)
    product = _product(ctx, ctx.tensor(x, dtype), weight, dtype)
    return product if bias is None else ctx.op("Add", product, ctx.tensor(bias, dtype))


def _product(ctx: Context, x: ir.Value, weight: fx.Node, dtype: torch.dtype) -> ir.Value:
    if weight.op != "get_attr":
        return ctx.op("MatMul", x, ctx.op("Transpose", ctx.tensor(weight, dtype), perm=[1, 0]))
    name = ctx.program.weights.resolve(str(weight.target))
    if name in ctx.settings["untransposed"]:
        # Tied to the embedding: one copy serves both.
        value = ctx.weight(name, dtype)
        if ctx.settings["contrib"]:
            return ctx.op("FusedMatMul", x, value, domain=MS, transB=1)
        return ctx.op("MatMul", x, ctx.op("Transpose", value, perm=[1, 0]))
    tensor = ctx.program.weights[name].cast(dtype)
    return ctx.op("MatMul", x, ctx.initializer(f"{name}.T", swap_last(tensor)))


def untransposed_weights(graph: fx.Graph, resolve: Any) -> frozenset[str]:
    """Weights of linears that something else than a linear uses too: tied embeddings."""
    linear: set[str] = set()
    other: set[str] = set()
    for node in graph.find_nodes(op="get_attr"):
        for user in node.users:
            as_weight = user.target is aten.linear.default and user.args[1] is node
            (linear if as_weight else other).add(resolve(str(node.target)))
    return frozenset(linear & other)


def _matmul(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    return ctx.op("MatMul", ctx.tensor(node.args[0], dtype), ctx.tensor(node.args[1], dtype))


def _addmm(ctx: Context, node: fx.Node) -> ir.Value:
    dtype = result_dtype(node)
    bias, left, right = (ctx.tensor(argument, dtype) for argument in node.args[:3])
    return ctx.op("Add", ctx.op("MatMul", left, right), bias)


TABLE: Mapping[Any, Lowering] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _addmm,
}
