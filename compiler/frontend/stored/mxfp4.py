"""MXFP4 (OCP Microscaling Formats 1.0), the format of gpt-oss's experts: E2M1 floats of 4 bits in blocks of 32.

`NAME_blocks` [E, N, K/32, 16] uint8 holds two values per byte, the lower half first; `NAME_scales` [E, N, K/32] uint8
holds the exponent of each block (bias 127). The weight NAME is [E, K, N] as in transformers (integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError
from moec.compiler.frontend.stored.base import Parts, Rule, StoredFormat
from moec.compiler.ir.encoded_weights import Encoded, FromFunction, PerBlock
from moec.compiler.ir.weights import LazyTensor, swap_last

E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
"""Twice the value of each code, so that all are integers; the scales are halved in turn."""

HALF_SCALES = torch.tensor([2.0 ** (exponent - 128) for exponent in range(256)])
"""Half the scale of each exponent, exact in float32."""

_HALVES = torch.tensor([[byte & 15, byte >> 4] for byte in range(256)], dtype=torch.uint8)
"""Both codes of each byte."""

_PAIRS = E2M1[_HALVES.to(torch.int32)].view(torch.int16).flatten()
"""Both values of each byte, as one int16."""

BLOCK = 32


def e2m1(data: Tensor) -> Tensor:
    """Twice the values of packed codes: uint8 [..., W] -> int8 [..., 2 W]."""
    return _PAIRS[data.to(torch.int32)].view(torch.int8)


def encoded(kind: str, packed: Callable[[int, int], Tensor], scales: PerBlock) -> Encoded:
    """A weight of E2M1 values.

    Args:
        kind: Name of the format in reports.
        packed: Start and stop along axis 0 -> the packed codes of these rows, uint8 [..., K / 2].
        scales: Half the scale of each value.

    Returns:
        A weight of the shape of `scales`, with its indices into the table `E2M1`.
    """
    return Encoded(
        kind,
        4,
        False,
        FromFunction(scales.shape, torch.int8, lambda start, stop: e2m1(packed(start, stop))),
        scales,
        indices=FromFunction(scales.shape, torch.uint8, lambda a, b: _HALVES[packed(a, b).to(torch.int32)].flatten(-2)),
        table=E2M1,
    )


def exponents(parts: Parts, rest: str, start: int, stop: int) -> Tensor:
    """Half the scales of rows [start, stop), float32: 2 ^ (exponent - 127) / 2.

    Raises:
        CheckpointError: An exponent is 255, which means NaN.
    """
    data = parts[rest].rows(start, stop).view(torch.uint8)
    if data.numel() and int(data.max()) == 255:
        raise CheckpointError(
            f"{parts[rest].entry.source.path}: tensor {parts.name}{rest} holds NaN (exponent 255)",
            hint="the checkpoint is damaged; download it again",
        )
    return HALF_SCALES[data.to(torch.int32)]


def _decode(parts: Parts) -> LazyTensor:
    blocks = parts.expect("_blocks", dtypes=(torch.uint8,))
    if len(blocks.shape) != 4 or blocks.shape[-1] * 2 != BLOCK:
        raise parts.misfit("_blocks")
    experts, rows, groups, _ = blocks.shape
    scales = parts.expect("_scales", (experts, rows, groups), dtypes=(torch.uint8,))
    factors = FromFunction(scales.shape, torch.float32, lambda start, stop: exponents(parts, "_scales", start, stop))
    spread = PerBlock(factors, (experts, rows, groups * BLOCK), (1, BLOCK))
    return swap_last(encoded("mxfp4", lambda start, stop: blocks.rows(start, stop).flatten(-2), spread))


MXFP4 = StoredFormat((Rule("_blocks", ("_scales",), "", _decode),))
