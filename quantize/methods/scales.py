"""Scales and zero points of groups of weights, from their range or by a search for the least squared error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError
from moec.quantize.formats import IntegerFormat, ScaleType

CHUNK = 1 << 19
"""Number of weights per pass: few enough to fit into the CPU's cache, enough to amortise the calls of PyTorch."""


@dataclass(frozen=True)
class ClipSearch:
    """The clip ratios to try: `steps` of them from 1 down to `smallest`; one step means no clipping.

    A ratio r reduces the range of a group to r times its range: the few weights outside are clipped, all others are
    rounded more finely. Each group keeps the ratio with the least squared error.
    """

    steps: int = 21
    smallest: float = 0.6

    def ratios(self) -> list[float]:
        """The ratios in descending order; the first is 1."""
        if self.steps == 1:
            return [1.0]
        return [1.0 - (1.0 - self.smallest) * step / (self.steps - 1) for step in range(self.steps)]


NO_CLIPPING = ClipSearch(steps=1)


def choose_scales(
    groups: Tensor,
    fmt: IntegerFormat,
    clip: ClipSearch,
) -> tuple[Tensor, Tensor]:
    """Choose the scale and zero point of each group.

    Args:
        groups: Weights, fp32 [..., block]; the last dimension shares a scale.
        fmt: The format.
        clip: Clip ratios to try.

    Returns:
        Scales fp32 [...], positive and exact in the format's scale dtype, and zero points fp32 [...] (0 if symmetric).
    """
    flat = groups.reshape(-1, groups.shape[-1])
    scales, zero_points = torch.empty(len(flat)), torch.empty(len(flat))
    rows = max(1, CHUNK // flat.shape[-1])
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        scales[part], zero_points[part] = _search(flat[part], fmt, clip)
    return scales.reshape(groups.shape[:-1]), zero_points.reshape(groups.shape[:-1])


def encode(
    groups: Tensor, scales: Tensor, zero_points: Tensor, fmt: IntegerFormat, *, out: Tensor | None = None
) -> Tensor:
    """The nearest codes, as integers in fp32; scales and zero points are broadcast to the groups.

    Args:
        groups: Weights, fp32.
        scales: Scales, fp32.
        zero_points: Zero points, fp32; not used if the format is symmetric.
        fmt: The format.
        out: Output tensor, which may be `groups`; a new tensor by default.
    """
    codes = torch.div(groups, scales, out=out).round_()
    if not fmt.symmetric:
        codes.add_(zero_points)
    return codes.clamp_(*fmt.code_range)


def check_scales(scales: Tensor, name: str) -> None:
    """Check for scales that overflowed their dtype.

    Raises:
        CheckpointError: A scale is infinite; the message names the tensor.
    """
    if not bool(scales.isfinite().all()):
        raise CheckpointError(
            f"{name}: its weights are too large for fp16 scales",
            hint="use a format with fp32 scales (for example int4:32:fp32), or leave the tensor float",
        )


def _search(groups: Tensor, fmt: IntegerFormat, clip: ClipSearch) -> tuple[Tensor, Tensor]:
    """The best scales and zero points of one chunk [groups, block]; the first of equal errors wins."""
    low, high = groups.amin(-1), groups.amax(-1)
    ratios = clip.ratios()
    scales, zero_points = _candidate(low, high, ratios[0], fmt)
    if len(ratios) == 1:
        return scales, zero_points
    least = _error(groups, scales, zero_points, fmt)
    for ratio in ratios[1:]:
        scale, zero_point = _candidate(low, high, ratio, fmt)
        error = _error(groups, scale, zero_point, fmt)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, scale, scales)
        zero_points = torch.where(better, zero_point, zero_points)
    return scales, zero_points


def _error(groups: Tensor, scales: Tensor, zero_points: Tensor, fmt: IntegerFormat) -> Tensor:
    scale, zero_point = scales.unsqueeze(-1), zero_points.unsqueeze(-1)
    return encode(groups, scale, zero_point, fmt).sub_(zero_point).mul_(scale).sub_(groups).square_().sum(-1)


def _candidate(low: Tensor, high: Tensor, ratio: float, fmt: IntegerFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover `ratio` times the range."""
    smallest, largest = fmt.code_range
    if fmt.symmetric:
        scale = torch.maximum(low * (ratio / smallest), high * (ratio / largest))
        return round_scales(scale, fmt.scale_type), torch.zeros_like(scale)
    # The range includes 0, so that 0 is exact: otherwise all-zero and sparse groups would get an offset.
    low, high = low.clamp(max=0) * ratio, high.clamp(min=0) * ratio
    scale = round_scales((high - low) / (largest - smallest), fmt.scale_type)
    return scale, (smallest - low / scale).round_().clamp_(smallest, largest)


_STEPS = {ScaleType.FP16: 2.0**-24, ScaleType.BF16: 2.0**-22}
"""Scales below the smallest normal number of fp16 are multiples of this; bfloat16 has eight significant bits."""


def round_scales(scales: Tensor, scale_type: ScaleType) -> Tensor:
    """Round scales to their dtype, as fp32; the scale of an all-zero group becomes 1, and NaN stays NaN.

    Subnormal fp16 numbers are too coarse for rounding to nearest: a scale could become 0 or half as large, which would
    clip the group. Such scales are rounded up.
    """
    if scale_type is not ScaleType.FP32:
        step = _STEPS[scale_type]
        tiny = scales < 2.0**-14
        normal = scales.to(scale_type.dtype).to(torch.float16).to(torch.float32)
        scales = torch.where(tiny, (scales / step).ceil() * step, normal)
    return torch.where(scales == 0, torch.ones_like(scales), scales)
