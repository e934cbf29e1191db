"""`moec::experts` in ops that TensorRT supports: no NonZero, no scatter that adds, no kernels of other domains.

Every form drops slots of weight 0: the expert's output is replaced by 0, not multiplied by it, so that NaN and infinity
have no effect. Sums are computed in float32, as in the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.operands import Experts
from moec.quantize.lazy import Quantized
from moec.targets.common.arguments import result_dtype
from moec.targets.onnx.context import DTYPES, Context, Lowering, np_dtype
from moec.targets.onnx.lowerings.grouped import activate
from moec.targets.tensorrt.forms import Form
from moec.targets.tensorrt.lowerings.quantized import dequantized

FLOAT = int(ir.DataType.FLOAT)


def _stack(ctx: Context, argument: Any) -> ir.Value:
    """The stacked weights or biases of a layer, [E, ...], in the layout of the Program."""
    name = ctx.program.weights.resolve(str(argument.target))
    own, dtype = ctx.program.weights[name], argument.meta["val"].dtype
    if isinstance(own, Quantized):
        value = dequantized(ctx, name, own, dtype)
        ctx.experts[name] = ctx.others[name]
        return value
    half = ctx.stored_half(name)
    stored = f"{name}.stack.fp16" if half and dtype is torch.float32 else f"{name}.stack"
    ctx.experts[name] = {"initializer": stored, "interleaved": False, "transposed": False}
    return ctx.initializer(f"{name}.stack", ctx.lazy(argument), half=half)


def _project(ctx: Context, x: ir.Value, weight: ir.Value, rank: int) -> ir.Value:
    """`x @ weight.T` for weights [..., N, K] of `rank` axes."""
    axes = list(range(rank))
    return ctx.op("MatMul", x, ctx.op("Transpose", weight, perm=[*axes[:-2], axes[-1], axes[-2]]))


class _Layer:
    """The operands of one experts node, lowered."""

    def __init__(self, ctx: Context, node: fx.Node) -> None:
        self.ctx, self.dtype = ctx, result_dtype(node)
        own = Experts.of(node)
        self.hidden, self.indices = ctx.tensor(own.hidden_states), ctx.tensor(own.indices, torch.int64)
        self.weights = ctx.tensor(own.weights, self.dtype)
        self.count, self.gate = own.num_experts, own.gate
        self._stacks = own.gate_up_proj, own.down_proj, own.gate_up_bias, own.down_bias

    def stacks(self) -> tuple[ir.Value, ir.Value, list[ir.Value | None]]:
        """The weights of both projections and their biases."""
        first, second, *biases = self._stacks
        made = [None if bias is None else _stack(self.ctx, bias) for bias in biases]
        return _stack(self.ctx, first), _stack(self.ctx, second), made

    def zero(self, dtype: torch.dtype) -> ir.Value:
        return self.ctx.constant(np.asarray(0, np_dtype(dtype)))

    def dense_weights(self) -> ir.Value:
        """Routing weights as [T, E]: 0 for every expert that was not selected for a token."""
        ctx = self.ctx
        numbers = ctx.constant(np.arange(self.count, dtype=np.int64).reshape(1, 1, -1))
        own = ctx.op("Equal", ctx.op("Unsqueeze", self.indices, ctx.ints(2)), numbers)
        spread = ctx.op("Where", own, ctx.op("Unsqueeze", self.weights, ctx.ints(2)), self.zero(self.dtype))
        return ctx.op("ReduceSum", spread, ctx.ints(1), keepdims=0)

    def run(self, x: ir.Value, first: ir.Value, second: ir.Value, biases: list[ir.Value | None], rank: int) -> ir.Value:
        """Both projections of experts applied to `x`, with weights of `rank` axes."""
        ctx = self.ctx
        for position, weight in enumerate((first, second)):
            x = _project(ctx, x, weight, rank)
            bias = biases[position]
            x = x if bias is None else ctx.op("Add", x, bias)
            x = activate(ctx, x, self.gate, self.dtype) if position == 0 else x
        return x

    def weighted(self, result: ir.Value, weights: ir.Value) -> ir.Value:
        """`result * weights` in float32, but 0 where the weight is 0, even if the result is NaN."""
        ctx = self.ctx
        if self.dtype != torch.float32:
            result, weights = (ctx.op("Cast", value, to=FLOAT) for value in (result, weights))
        zero = self.zero(torch.float32)
        return ctx.op("Where", ctx.op("Equal", weights, zero), zero, ctx.op("Mul", result, weights))

    def narrowed(self, total: ir.Value) -> ir.Value:
        """The float32 sum, cast to the dtype of the graph."""
        return total if self.dtype == torch.float32 else self.ctx.op("Cast", total, to=int(DTYPES[self.dtype]))


def _gather(ctx: Context, node: fx.Node) -> ir.Value:
    """Gather the weights of every slot, [T, k, N, K]; for few tokens."""
    layer = _Layer(ctx, node)
    last, zero = ctx.constant(np.int64(layer.count - 1)), ctx.constant(np.int64(0))
    inside = ctx.op("Clip", layer.indices, zero, last)
    # A slot whose index is not that of an expert is padding.
    weights = ctx.op("Where", ctx.op("Equal", inside, layer.indices), layer.weights, layer.zero(layer.dtype))

    def own(stack: ir.Value) -> ir.Value:
        return ctx.op("Gather", stack, inside, axis=0)

    first, second, stacked = layer.stacks()
    biases = [None if bias is None else ctx.op("Unsqueeze", own(bias), ctx.ints(2)) for bias in stacked]
    x = ctx.op("Unsqueeze", layer.hidden, ctx.ints(1, 2))
    result = ctx.op("Squeeze", layer.run(x, own(first), own(second), biases, 4), ctx.ints(2))
    slots = layer.weighted(result, ctx.op("Unsqueeze", weights, ctx.ints(2)))
    return layer.narrowed(ctx.op("ReduceSum", slots, ctx.ints(1), keepdims=0))


def _dense(ctx: Context, node: fx.Node) -> ir.Value:
    """Compute every expert for every token, [E, T, H]."""
    layer = _Layer(ctx, node)
    first, second, stacked = layer.stacks()
    biases = [None if bias is None else ctx.op("Unsqueeze", bias, ctx.ints(1)) for bias in stacked]
    x = ctx.op("Unsqueeze", layer.hidden, ctx.ints(0))
    result = layer.run(x, first, second, biases, 3)
    columns = ctx.op("Unsqueeze", ctx.op("Transpose", layer.dense_weights(), perm=[1, 0]), ctx.ints(2))
    return layer.narrowed(ctx.op("ReduceSum", layer.weighted(result, columns), ctx.ints(0), keepdims=0))


def _loop_if(ctx: Context, node: fx.Node) -> ir.Value:
    """A Loop over the experts with an If in it, which skips experts without tokens."""
    layer = _Layer(ctx, node)
    dense = layer.dense_weights()
    columns = ctx.op("Unsqueeze", ctx.op("Transpose", dense, perm=[1, 0]), ctx.ints(2))
    most = ctx.op("ReduceMax", ctx.op("Abs", dense), ctx.ints(0), keepdims=0)
    used = ctx.op("Greater", most, layer.zero(layer.dtype))
    empty = ctx.op("ConstantOfShape", ctx.op("Shape", layer.hidden), value=ir.Tensor(np.zeros(1, np.float32)))
    shape = ctx.shape_of(node.meta["val"].shape)
    with ctx.subgraph("experts") as body:
        index, go_on = _input("expert", ir.DataType.INT64, []), _input("go_on", ir.DataType.BOOL, [])
        total = _input("total", ir.DataType.FLOAT, shape)
        body.inputs.extend([index, go_on, total])
        with ctx.subgraph("used") as then:
            then.outputs.append(_add_expert(layer, index, columns, total))
        with ctx.subgraph("idle") as otherwise:
            otherwise.outputs.append(ctx.op("Identity", total))
        hit = ctx.op("Gather", used, index, axis=0)
        body.outputs.append(_typed(ctx.op("Identity", go_on), ir.DataType.BOOL, ir.Shape([])))
        for branch in (then, otherwise):
            _typed(branch.outputs[0], ir.DataType.FLOAT, shape)
        summed = ctx.op("If", hit, then_branch=then, else_branch=otherwise)
        body.outputs.append(_typed(summed, ir.DataType.FLOAT, shape))
    count = ctx.constant(np.int64(layer.count))
    return layer.narrowed(ctx.op("Loop", count, ctx.constant(np.bool_(True)), empty, body=body))


def _add_expert(layer: _Layer, index: ir.Value, columns: ir.Value, total: ir.Value) -> ir.Value:
    ctx = layer.ctx

    def own(stack: ir.Value) -> ir.Value:
        return ctx.op("Gather", stack, index, axis=0)

    first, second, stacked = layer.stacks()
    biases = [None if bias is None else own(bias) for bias in stacked]
    result = layer.run(layer.hidden, own(first), own(second), biases, 2)
    return ctx.op("Add", total, layer.weighted(result, own(columns)))


def _input(name: str, dtype: ir.DataType, shape: Any) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _typed(value: ir.Value, dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
    value.type, value.shape = ir.TensorType(dtype), shape
    return value


BY_FORM: Mapping[Form, Lowering] = {Form.GATHER: _gather, Form.LOOP_IF: _loop_if, Form.DENSE: _dense}
