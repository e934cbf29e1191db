"""Quantized weights in standard ops: `DequantizeLinear` with blocks, from opset 21 on."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from moec.quantize.lazy import Quantized
from moec.targets.common.arguments import result_dtype
from moec.targets.common.refusals import refuse
from moec.targets.onnx.context import Context
from moec.targets.onnx.lowerings.quantized import (
    Packed,
    fills_bytes,
    kernel_block,
    kernel_groups,
    pack,
    scales_of,
    stored_entry,
)


def dequantized_product(ctx: Context, node: fx.Node, x: ir.Value, name: str, weight: Quantized) -> ir.Value:
    """`x @ weight.T` by DequantizeLinear and MatMul, for dialects with standard ops only."""
    product: ir.Value = ctx.op("MatMul", x, ctx.op("Transpose", dequantize(ctx, node, name, weight), perm=[1, 0]))
    return product


def dequantize(ctx: Context, node: fx.Node, name: str, weight: Quantized) -> ir.Value:
    """The float matrix [N, K] by DequantizeLinear with blocks, from opset 21 on; int4 codes are of the type INT4."""
    block = kernel_block(weight)
    groups = kernel_groups(weight, block)
    if not weight.format.symmetric:
        raise refuse(node, "zero points are not supported in standard ops", hint="use a symmetric format")
    if not fills_bytes(weight):
        reason = f"{weight.name}: rows of {weight.shape[-1]} int4 codes do not fill whole bytes"
        raise refuse(node, reason, hint="use int8 for this weight, or leave it float")
    ctx.others[name] = stored_entry(weight, block, base=name, signed=True)
    return ctx.shared(
        ("dequantized", name),
        lambda: ctx.op(
            "DequantizeLinear",
            signed_codes(ctx, name, weight),
            scales_of(ctx, name, [weight], groups, result_dtype(node)),
            axis=1,
            block_size=block,
        ),
    )


def signed_codes(ctx: Context, name: str, weight: Quantized) -> ir.Value:
    """Codes [..., N, K] as DequantizeLinear takes them: int8, or INT4 with two to a byte."""
    if weight.format.bits == 8:
        return ctx.initializer(f"{name}.codes", Packed(weight, lambda part: part.codes, weight.shape, torch.int8))
    bytes_of = Packed(
        weight,
        lambda part: pack(part.codes.contiguous().view(torch.uint8) & 15, 4),
        (*weight.shape[:-1], (weight.shape[-1] + 1) // 2),
        torch.uint8,
    )
    return ctx.initializer(f"{name}.codes", bytes_of, packed=(ir.DataType.INT4, weight.shape))
