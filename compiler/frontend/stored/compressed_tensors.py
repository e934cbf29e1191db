"""compressed-tensors (llm-compressor, vLLM): packed integers, plain int8 and fp8, MXFP4 and NVFP4.

- packed integers: `weight_packed` int32 [N, K * bits / 32], `weight_scale` [N, G], `weight_shape` [2]; if asymmetric,
  `weight_zero_point` int32 [N * bits / 32, G], packed along N; with activation order, `weight_g_idx` [K]. Codes and
  zero points are stored with half their range added.
- `weight` int8 or fp8 with `weight_scale`, one per tensor, row, group or block, and `weight_zero_point` int8.
- `weight_packed` uint8 [N, K / 2] of E2M1 values with `weight_scale` uint8 [N, K / 32] (exponents), or fp8 [N, K / 16]
  divided by `weight_global_scale`.

(compressed_tensors/compressors/*/base.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.frontend.stored.base import Parts, Rule, Settings, StoredFormat, signed, unpack
from moec.compiler.frontend.stored.fp8 import FLOATS, scales_by_block
from moec.compiler.frontend.stored.mxfp4 import BLOCK, encoded, exponents
from moec.compiler.ir.encoded_weights import Encoded, FromFunction, PerBlock
from moec.compiler.ir.weights import LazyTensor

BITS = (2, 4, 8)
_OTHERS = ("weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")


def _decode_packed(parts: Parts) -> LazyTensor:
    packed = parts["weight_packed"]
    if packed.dtype == torch.uint8:
        return _decode_floats(parts)
    parts.expect("weight_packed", dtypes=(torch.int32,))
    sizes = parts.expect("weight_shape", (len(packed.shape),)).read().tolist()
    shape = tuple(int(size) for size in sizes)
    if len(shape) < 2 or shape[:-1] != packed.shape[:-1] or not packed.shape[-1]:
        raise parts.misfit("weight_shape")
    columns = shape[-1]
    bits = next((bits for bits in range(1, 9) if -(-columns * bits // 32) == packed.shape[-1]), 0)
    if bits not in BITS:
        raise parts.unsupported(f"moec reads packed integers of {', '.join(map(str, BITS))} bits, not of {bits} bits")

    def codes(start: int, stop: int) -> Tensor:
        return signed(unpack(packed.rows(start, stop), bits)[..., :columns], bits)

    scales = _scales(parts, shape)
    zeros = _zeros(parts, shape, bits, scales)
    return Encoded("compressed-tensors", bits, True, FromFunction(shape, torch.int8, codes), scales, zeros)


def _scales(parts: Parts, shape: tuple[int, ...]) -> PerBlock:
    index = parts.get("weight_g_idx")
    spread = scales_by_block(parts, "weight_scale", shape, _structure(parts.settings))
    if index is None or spread.source.shape[-1] == 1:
        return spread
    return PerBlock(spread.source, shape, spread.block, parts.expect("weight_g_idx", shape[-1:]))


def _zeros(parts: Parts, shape: tuple[int, ...], bits: int, scales: PerBlock) -> PerBlock | None:
    stored = parts.get("weight_zero_point")
    if stored is None:
        return None
    if stored.dtype != torch.int32:
        spread = scales_by_block(parts, "weight_zero_point", shape, scales.block)
        return PerBlock(spread.source, shape, scales.block, scales.index)
    if len(shape) > 2 or stored.shape != (-(-shape[0] * bits // 32), scales.source.shape[-1]):
        raise parts.misfit("weight_zero_point")

    def points(start: int, stop: int) -> Tensor:
        return signed(unpack(stored.read().T, bits).T[start:stop], bits)

    return PerBlock(FromFunction(scales.source.shape, torch.int8, points), shape, scales.block, scales.index)


def _decode_plain(parts: Parts) -> LazyTensor:
    weight = parts.expect("weight", dtypes=(*FLOATS, torch.int8))
    if len(weight.shape) < 2:
        raise parts.misfit("weight")
    scales = _scales(parts, weight.shape)
    if weight.dtype in FLOATS:
        return Encoded("fp8", 8, False, weight, scales)
    return Encoded("compressed-tensors", 8, True, weight, scales, _zeros(parts, weight.shape, 8, scales))


def _decode_floats(parts: Parts) -> LazyTensor:
    """Decode MXFP4 or NVFP4: two E2M1 values per byte. `encoded` takes doubled values, so scales are halved."""
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    if scale.dtype == torch.uint8:
        if scale.shape != (*shape[:-1], shape[-1] // BLOCK):
            raise parts.misfit("weight_scale")
        factors = FromFunction(scale.shape, torch.float32, lambda a, b: exponents(parts, "weight_scale", a, b))
        return encoded("mxfp4", packed.rows, PerBlock(factors, shape, (1, BLOCK)))
    whole = parts["weight_global_scale"]
    if torch.Size(whole.shape).numel() != 1 or scale.shape[:-1] != shape[:-1] or shape[-1] % scale.shape[-1]:
        raise parts.misfit("weight_scale")

    def divided(start: int, stop: int) -> Tensor:
        return scale.rows(start, stop).to(torch.float32) / (2 * whole.read().to(torch.float32).reshape(()))

    factors = FromFunction(scale.shape, torch.float32, divided)
    return encoded("nvfp4", packed.rows, PerBlock(factors, shape, (1, shape[-1] // scale.shape[-1])))


def _structure(settings: Settings) -> tuple[int, int] | None:
    """Rows and columns of a block, if a group of the settings has a block_structure."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        size = weights.get("block_structure") if isinstance(weights, dict) else None
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def _refuse(settings: Settings) -> str:
    sparsity = settings.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    if sparse != "dense":
        return f"moec does not read compressed-tensors with the sparse format {sparse!r}"
    return "moec does not read compressed-tensors with transforms" if settings.get("transform_config") else ""


COMPRESSED_TENSORS = StoredFormat(
    (
        Rule("weight_packed", ("weight_scale", *_OTHERS), "weight", _decode_packed),
        Rule("weight_scale", ("weight", *_OTHERS), "weight", _decode_plain),
    ),
    _refuse,
)
