"""The quantized tensor: codes, scales and zero points, in a layout that does not depend on a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.quantize.formats import IntegerFormat


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized matrix, or a stack of them.

    Attributes:
        format: Its format, with a resolved block size.
        codes: Signed codes, one per element, int8 [..., N, K].
        scales: Positive scales, fp16 or fp32 [..., N, K / block].
        zero_points: Signed zero points, int8 [..., N, K / block]; None when symmetric.
    """

    format: IntegerFormat
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None

    def __post_init__(self) -> None:
        groups = self.codes.shape[-1] // self.block
        expected = (*self.codes.shape[:-1], groups)
        if self.scales.shape != expected or groups * self.block != self.codes.shape[-1]:
            raise ValueError(f"scales have shape {tuple(self.scales.shape)}, expected {expected}")
        if (self.zero_points is None) != self.format.symmetric:
            raise ValueError("an asymmetric format has zero points, a symmetric one has none")
        if self.zero_points is not None and self.zero_points.shape != expected:
            raise ValueError(f"zero points have shape {tuple(self.zero_points.shape)}, expected {expected}")

    @property
    def block(self) -> int:
        """Number of weights that share a scale."""
        return self.format.block_length(self.codes.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """Shape of the float tensor, [..., N, K]."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float tensor [..., N, K], computed in fp32."""
        groups = grouped(self.codes, self.block).to(torch.float32)
        if self.zero_points is not None:
            groups -= self.zero_points.unsqueeze(-1)
        groups *= self.scales.to(torch.float32).unsqueeze(-1)
        return groups.flatten(-2).to(dtype)

    def unsigned_codes(self) -> Tensor:
        """Codes shifted by half the range to uint8: 0 becomes 8 (four bits) or 128 (eight bits)."""
        return _unsigned(self.codes, self.format.bits)

    def unsigned_zero_points(self) -> Tensor:
        """Zero points for `unsigned_codes`: uint8 [..., N, K / block]; constant if symmetric."""
        if self.zero_points is None:
            return torch.full(self.scales.shape, 1 << (self.format.bits - 1), dtype=torch.uint8)
        return _unsigned(self.zero_points, self.format.bits)

    def __getitem__(self, expert: int) -> QuantizedTensor:
        """The matrix of one expert of a stack [E, N, K]."""
        zero_points = None if self.zero_points is None else self.zero_points[expert]
        return QuantizedTensor(self.format, self.codes[expert], self.scales[expert], zero_points)


def stack(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    """Stack E matrices [N, K] of one format -> [E, N, K]."""
    if len({tensor.format for tensor in tensors}) != 1:
        raise ValueError("tensors of different formats cannot be stacked")
    return _combined(torch.stack, tensors)


def join(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Concatenate slices of one tensor along axis 0."""
    if len(parts) == 1:
        return parts[0]
    return _combined(torch.cat, parts)


def _combined(how: Callable[[list[Tensor]], Tensor], parts: list[QuantizedTensor]) -> QuantizedTensor:
    points = [part.zero_points for part in parts if part.zero_points is not None]
    codes, scales = how([part.codes for part in parts]), how([part.scales for part in parts])
    return QuantizedTensor(parts[0].format, codes, scales, how(points) if points else None)


def grouped(tensor: Tensor, block: int) -> Tensor:
    """View the last dimension K as [K / block, block]."""
    return tensor.reshape(*tensor.shape[:-1], -1, block)


def _unsigned(signed: Tensor, bits: int) -> Tensor:
    # In two's complement this adds half the range; for negative codes the byte wraps around.
    return signed.view(torch.uint8) + (1 << (bits - 1))
