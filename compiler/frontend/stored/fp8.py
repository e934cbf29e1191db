"""fp8 with a scale for each block, row or tensor: `NAME` and `NAME_scale_inv` (DeepSeek-V3, Qwen3-FP8).

`weight = value * scale_inv`. Blocks have the size `weight_block_size`; the last block of a row or column may be partial
(transformers/integrations/finegrained_fp8.py, DeepSeek-V3's inference/fp8_cast_bf16.py). Scales may be exponents
(`scale_fmt: ue8m0`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.frontend.stored.base import Parts, Rule, StoredFormat
from moec.compiler.ir.derived_weights import Reshaped
from moec.compiler.ir.encoded_weights import Encoded, PerBlock
from moec.compiler.ir.weights import LazyTensor, Mapped

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def scales_by_block(parts: Parts, rest: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> PerBlock:
    """The scales of a weight, spread over its elements.

    Args:
        parts: The tensors of the weight.
        rest: Name suffix of the scales, of which there is one per tensor, row or block.
        shape: Shape of the weight, [..., N, K].
        block: Rows and columns of a block if the settings give them; else they follow from the shapes.

    Returns:
        [..., N, K] float32.

    Raises:
        CheckpointError: The scales do not fit.
    """
    stored, lead = parts[rest], shape[:-2]
    grid = stored.shape
    if torch.Size(grid).numel() == 1 and not lead:
        grid = (1, 1)
    elif grid in {lead, shape[:-1]}:
        grid = (*grid, *(1,) * (len(shape) - len(grid)))
    if len(grid) != len(shape) or grid[:-2] != lead:
        raise parts.misfit(rest)
    high = _step(shape[-2], grid[-2], None if block is None else block[0])
    wide = _step(shape[-1], grid[-1], None if block is None else block[1])
    if not high or not wide:
        raise parts.misfit(rest)
    numbers = Mapped(stored, _numbers, stored.shape, torch.float32)
    return PerBlock(Reshaped(numbers, grid), shape, (high, wide))


def _numbers(stored: Tensor) -> Tensor:
    """Scales as float32; uint8 means exponents (ue8m0)."""
    return (stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored).to(torch.float32)


def _step(length: int, count: int, given: int | None) -> int:
    """The block size with which `count` blocks cover `length`; 0 if there is none."""
    if count == 1:
        return length
    if given is not None and -(-length // given) == count:
        return given
    return length // count if length % count == 0 else 0


def _decode(parts: Parts) -> LazyTensor:
    rest = next(end for end in parts.tensors if end.endswith("_scale_inv")).removesuffix("_scale_inv")
    weight = parts.expect(rest, dtypes=FLOATS)
    if len(weight.shape) < 2:
        raise parts.misfit(rest)
    size = parts.settings.get("weight_block_size")
    block = (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None
    return Encoded("fp8", 8, False, weight, scales_by_block(parts, f"{rest}_scale_inv", weight.shape, block))


FP8 = StoredFormat(
    tuple(Rule(f"{name}_scale_inv", (name,), name, _decode) for name in ("weight", "gate_up_proj", "down_proj"))
)
"""Weights of linear layers, and stacks of experts."""
