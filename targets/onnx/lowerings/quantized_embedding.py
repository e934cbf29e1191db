"""Quantized tables: `GatherBlockQuantized`, or rows of a `DequantizeLinear`."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from moec.quantize.lazy import Quantized
from moec.targets.common.arguments import result_dtype
from moec.targets.onnx.context import MS, Context
from moec.targets.onnx.lowerings.quantized import (
    Packed,
    kernel_block,
    kernel_groups,
    pack,
    scales_of,
    stored_entry,
    stored_once_as,
    zero_points_of,
)
from moec.targets.onnx.lowerings.standard_quantized import dequantize


def embedding(ctx: Context, node: fx.Node, indices: ir.Value, name: str, weight: Quantized) -> ir.Value:
    """Rows of a quantized table, dequantized as they are gathered."""
    if not ctx.dialect.contrib:
        rows: ir.Value = ctx.op("Gather", dequantize(ctx, node, name, weight), indices, axis=0)
        return rows
    block, bits = kernel_block(weight), weight.format.bits
    groups = kernel_groups(weight, block)
    codes = Packed(
        weight,
        lambda part: pack(part.unsigned_codes(), bits),
        (weight.shape[0], weight.shape[1] * bits // 8),
        torch.uint8,
        identity=stored_once_as(weight, block),
    )
    ctx.others[name] = {**stored_entry(weight, block, base=name), "codes": f"{name}.table"}
    zero_points = None
    if not weight.format.symmetric:
        zero_points = ctx.initializer(f"{name}.zero_points", zero_points_of(weight, groups))
    return ctx.op(
        "GatherBlockQuantized",
        ctx.initializer(f"{name}.table", codes),
        indices,
        scales_of(ctx, name, [weight], groups, result_dtype(node)),
        zero_points,
        domain=MS,
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
