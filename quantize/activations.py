"""How kernels round activations to int8 at run time, for products with quantized weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ir.weights import LazyTensor
from moec.quantize.formats import Activations, IntegerFormat
from moec.quantize.lazy import Coded


def round_rows_to_int8(weight: LazyTensor, activations: Tensor) -> Tensor:
    """Round each row to int8 with its own scale and zero point, if the format of the weight is `int8-dynamic`.

    This is what XNNPACK's qd8 kernels do: scale = (high - low) / 255 over a range that includes 0, and a zero point in
    [-128, 127] (xnn_f32_qd8_asymmetric_quantization_params in XNNPACK's src/xnnpack/quantization.h).

    Args:
        weight: The weight of the product.
        activations: [..., K], any float dtype.

    Returns:
        The rounded activations, dequantized to their dtype; `activations` itself if the weight's format leaves them
        float.
    """
    form = weight.format if isinstance(weight, Coded) else None
    if not isinstance(form, IntegerFormat) or form.activations is not Activations.INT8_DYNAMIC:
        return activations
    values = activations.to(torch.float32)
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = (-128 - low / scale).round().clamp(-128, 127)
    codes = ((values / scale).round() + zero_point).clamp(-128, 127)
    return ((codes - zero_point) * scale).to(activations.dtype)


def round_blocks_to_int8(activations: Tensor, block: int) -> Tensor:
    """Round each block of a row to codes -127 .. 127 with its own scale, the largest value over 127.

    This is what MLAS does in `MatMulNBits` and `QMoE` of ONNX Runtime on CPU if `accuracy_level` is 4
    (QuantizeARow_CompInt8 in onnxruntime/core/mlas/lib/sqnbitgemm_kernel_avx2.cpp).

    Args:
        activations: [..., K], any float dtype.
        block: Block size of the weight; the last block of a row may be shorter.

    Returns:
        The rounded activations, dequantized to their dtype.
    """
    columns = activations.shape[-1]
    values = torch.nn.functional.pad(activations.to(torch.float32), (0, -columns % block))
    values = values.reshape(*activations.shape[:-1], -1, block)
    largest = values.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    rounded: Tensor = (values * inverse).round() * (largest / 127)
    return rounded.flatten(-2)[..., :columns].to(activations.dtype)
