"""Quantized weights as `DequantizeLinear` of constants: symmetric int8 or int4, with a scale per block of a row."""

from __future__ import annotations

import onnx_ir as ir
import torch

from moec.quantize.formats import Activations
from moec.quantize.lazy import Quantized
from moec.targets.common.refusals import RefusedError
from moec.targets.onnx.context import DTYPES, Context
from moec.targets.onnx.lowerings.quantized import Packed, expand_scales, stored_entry
from moec.targets.onnx.lowerings.standard_quantized import signed_codes

HINT = (
    "TensorRT supports int8 per channel or in blocks and int4 in blocks, without zero points and with float "
    "activations, such as int8 or int4:64"
)
BLOCKS = (128, 64, 32, 16)
"""Block sizes in the file. The builder fails on a single block per row."""
FIRST_OPSET = 21
"""First opset whose DequantizeLinear has blocks."""


def unsupported_reason(weight: Quantized) -> str:
    """Why TensorRT does not support the format of a weight; empty if it does."""
    form = weight.format
    if not form.symmetric:
        return "DequantizeLinear supports no zero points other than 0"
    if form.bits == 4 and form.granularity == "channel":
        return "int4 is supported in blocks only"
    if form.activations is not Activations.FLOAT:
        return "the parser does not support DynamicQuantizeLinear, so activations cannot be rounded to int8"
    if not stored_block(weight):
        return f"its block size is not a multiple of {BLOCKS[-1]}, or its rows are not longer than that"
    return ""


def stored_block(weight: Quantized) -> int:
    """Block size of `weight` in the file; 0 if no size in `BLOCKS` fits."""
    return next((size for size in BLOCKS if weight.block % size == 0 and size < weight.shape[-1]), 0)


def dequantized(ctx: Context, name: str, weight: Quantized, dtype: torch.dtype) -> ir.Value:
    """The float values [..., N, K] of a quantized weight, in `dtype`.

    Codes and scales are constants in the file, with two int4 codes per byte. Scales are stored in the dtype of the plan
    and cast to that of the graph, which is then the dtype of DequantizeLinear's output.

    Raises:
        RefusedError: TensorRT does not support the format.
    """
    if reason := unsupported_reason(weight):
        raise RefusedError(name, f"format {weight.format}: {reason}", hint=HINT)
    block = stored_block(weight)
    groups = weight.shape[-1] // block
    ctx.others[name] = stored_entry(weight, block, base=name, signed=True)

    def make() -> ir.Value:
        return ctx.op(
            "DequantizeLinear",
            signed_codes(ctx, name, weight),
            _scales(ctx, name, weight, groups, dtype),
            axis=len(weight.shape) - 1,
            block_size=block,
        )

    return ctx.shared(("dequantized", name, dtype), make)


def _scales(ctx: Context, name: str, weight: Quantized, groups: int, dtype: torch.dtype) -> ir.Value:
    stored = weight.format.scale_type.dtype
    tensor = Packed(
        weight, lambda part: expand_scales(part.scales, groups).to(stored), (*weight.shape[:-1], groups), stored, True
    )
    value = ctx.initializer(f"{name}.scales", tensor)
    return value if stored is dtype else ctx.op("Cast", value, to=int(DTYPES[dtype]))
