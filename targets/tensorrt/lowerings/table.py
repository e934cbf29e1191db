"""The TensorRT dialect: standard ONNX, with other lowerings where the parser or the builder fails."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.operands import RmsNorm
from moec.compiler.ir.program import ATTENTION, EXPERTS, RMS_NORM, ROTARY
from moec.quantize.lazy import Quantized
from moec.targets.common.arguments import result_dtype
from moec.targets.onnx.context import DTYPES, Context, Dialect, Lowering, np_dtype
from moec.targets.onnx.lowerings.norm import rotary_plain
from moec.targets.onnx.lowerings.table import TABLE
from moec.targets.tensorrt.forms import Form
from moec.targets.tensorrt.lowerings.attention import decomposed_attention, fused_attention
from moec.targets.tensorrt.lowerings.experts import BY_FORM
from moec.targets.tensorrt.lowerings.quantized import dequantized

aten = torch.ops.aten
FUSED_OPSET = 23
"""First opset with RMSNormalization, RotaryEmbedding and Attention."""


def tensorrt_dialect(form: Form, opset: int, *, fused: bool = False) -> Dialect:
    """The dialect of an opset and a form of experts; `fused`: attention as one op where possible."""
    overrides: dict[object, Lowering] = {
        EXPERTS: BY_FORM[form],
        ATTENTION: fused_attention if fused else decomposed_attention,
        aten.linear.default: _linear,
        aten.embedding.default: _embedding,
    }
    if opset < FUSED_OPSET:
        overrides |= {RMS_NORM: _rms_norm, ROTARY: rotary_plain}
    return Dialect("tensorrt", {**TABLE, **overrides}, opset=opset, input_defaults=False)


def _quantized(ctx: Context, argument: object) -> tuple[str, Quantized] | None:
    """Name and value of a quantized weight; None for any other operand."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    name = ctx.program.weights.resolve(str(argument.target))
    own = ctx.program.weights[name]
    return (name, own) if isinstance(own, Quantized) else None


def _linear(ctx: Context, node: fx.Node) -> ir.Value:
    x, weight, bias = node.args
    found = _quantized(ctx, weight)
    if found is None:
        value: ir.Value = TABLE[aten.linear.default](ctx, node)
        return value
    dtype = result_dtype(node)
    matrix = ctx.op("Transpose", dequantized(ctx, *found, dtype), perm=[1, 0])
    product = ctx.op("MatMul", ctx.tensor(x, dtype), matrix)
    return product if bias is None else ctx.op("Add", product, ctx.tensor(bias, dtype))


def _embedding(ctx: Context, node: fx.Node) -> ir.Value:
    found = _quantized(ctx, node.args[0])
    if found is None:
        value: ir.Value = TABLE[aten.embedding.default](ctx, node)
        return value
    return ctx.op("Gather", dequantized(ctx, *found, result_dtype(node)), ctx.tensor(node.args[1]), axis=0)


def _rms_norm(ctx: Context, node: fx.Node) -> ir.Value:
    """RMSNorm in elementary ops, computed in float32 as in the reference."""
    own, dtype = RmsNorm.of(node), result_dtype(node)
    x, weight, eps = own.hidden_states, own.weight, own.eps
    wide = ctx.tensor(x, torch.float32)
    mean = ctx.op("ReduceMean", ctx.op("Mul", wide, wide), ctx.ints(-1), keepdims=1)
    root = ctx.op("Sqrt", ctx.op("Add", mean, ctx.constant(np.asarray(eps, np_dtype(torch.float32)))))
    normed = ctx.op("Div", wide, root)
    normed = normed if dtype == torch.float32 else ctx.op("Cast", normed, to=int(DTYPES[dtype]))
    return normed if weight is None else ctx.op("Mul", normed, ctx.tensor(weight, dtype))
