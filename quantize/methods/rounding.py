"""Round to nearest (RTN), with an optional search for the clip ratio of each group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError, UsageError
from moec.quantize.formats import IntegerFormat
from moec.quantize.methods.scales import CHUNK, NO_CLIPPING, ClipSearch, check_scales, choose_scales, encode
from moec.quantize.methods.tensors import QuantizedTensor, grouped


class Method(StrEnum):
    """How a matrix was rounded."""

    RTN = "rtn"
    GPTQ = "gptq"


@dataclass(frozen=True)
class MatrixReport:
    """How one matrix (one expert of a stack) was rounded.

    Attributes:
        method: The method.
        tokens: Number of calibration tokens that this matrix has seen; 0 without calibration.
        error: Squared error over squared norm: of the outputs for the calibration tokens if there are any,
            else of the weights. 0 for an all-zero matrix.
        reason: Why the method is not GPTQ although GPTQ was requested; empty otherwise.
    """

    method: Method
    tokens: int
    error: float
    reason: str = ""


@dataclass(frozen=True, eq=False)
class RoundingResult:
    """A quantized tensor and one report per matrix: E of them for [E, N, K], one for [N, K]."""

    tensor: QuantizedTensor
    matrices: tuple[MatrixReport, ...]


def round_to_nearest(
    weight: Tensor,
    fmt: IntegerFormat,
    *,
    name: str,
    clip: ClipSearch = NO_CLIPPING,
) -> RoundingResult:
    """Quantize by rounding each weight to the nearest code.

    Without clipping, the error of each weight is at most half a scale (plus one rounding of fp32).

    Args:
        weight: Float weights, any float dtype, [N, K] or [E, N, K].
        fmt: The format; "auto" blocks are resolved here.
        name: Name of the tensor, for errors.
        clip: Clip ratios to try; none by default.

    Raises:
        UsageError: The block does not divide K, or the tensor is not a matrix or a stack of them.
        CheckpointError: The tensor holds NaN or infinity, or is too large for its scale dtype.
    """
    check_axes(weight, name)
    resolved = fmt.resolve(weight.shape[-1], name)
    parts = [_round_matrix(matrix, resolved, clip, name) for matrix in matrices(weight)]
    tensor = assemble(
        [(codes, scales, zero_points) for codes, scales, zero_points, _ in parts], resolved, weight.shape, name
    )
    return RoundingResult(tensor, tuple(MatrixReport(Method.RTN, 0, error) for *_, error in parts))


def nearest_values(weight: Tensor, fmt: IntegerFormat, *, name: str, clip: ClipSearch = NO_CLIPPING) -> Tensor:
    """The dequantized result of `round_to_nearest`, computed without the codes, which is half the work.

    Arguments and errors are those of `round_to_nearest`.

    Returns:
        fp32 in the shape of `weight`, equal to `round_to_nearest(...).tensor.dequantize()`, except that zeros may be
        negative.
    """
    check_axes(weight, name)
    resolved = fmt.resolve(weight.shape[-1], name)
    block = resolved.block_length(weight.shape[-1])
    values = torch.empty(weight.shape, dtype=torch.float32)
    for matrix, own in zip(matrices(weight), matrices(values), strict=True):
        held = grouped(own, block)
        for part in _parts(matrix):
            groups = held[part].copy_(grouped(matrix[part], block))
            scales, zero_points = _scales(groups, resolved, clip, name)
            encode(groups, scales, zero_points, resolved, out=groups)
            if not resolved.symmetric:
                groups.sub_(zero_points)
            groups.mul_(scales)
    return values


def _round_matrix(
    matrix: Tensor, fmt: IntegerFormat, clip: ClipSearch, name: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Codes int8 [N, K], scales [N, G], zero points [N, G] and relative squared error of one matrix."""
    rows, columns = matrix.shape
    block = fmt.block_length(columns)
    codes = torch.empty(rows, columns // block, block, dtype=torch.int8)
    scales, zero_points = torch.empty(2, rows, columns // block, 1)
    lost = norm = 0.0
    for part in _parts(matrix):
        groups = grouped(matrix[part].to(torch.float32), block)
        scale, zero_point = scales[part], zero_points[part] = _scales(groups, fmt, clip, name)
        rounded = encode(groups, scale, zero_point, fmt)
        codes[part] = rounded
        if not fmt.symmetric:
            rounded.sub_(zero_point)
        change = rounded.mul_(scale).sub_(groups).flatten()
        lost += float(torch.dot(change, change))
        norm += float(torch.dot(groups.flatten(), groups.flatten()))
    return codes.flatten(-2), scales.squeeze(-1), zero_points.squeeze(-1), relative(lost, norm)


def _parts(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix that fit into the CPU's cache."""
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)


def _scales(groups: Tensor, fmt: IntegerFormat, clip: ClipSearch, name: str) -> tuple[Tensor, Tensor]:
    """Scales and zero points, fp32 [n, G, 1], of groups [n, G, block].

    Raises:
        CheckpointError: The weights hold NaN or infinity, or are too large for the scale dtype.
    """
    scales, zero_points = choose_scales(groups, fmt, clip)
    if not bool(scales.isfinite().all()):
        # Non-finite weights give a non-finite scale, so weights need no check in the usual case.
        check_finite(groups, name)
        check_scales(scales, name)
    return scales.unsqueeze(-1), zero_points.unsqueeze(-1)


def check_weight(weight: Tensor, name: str) -> None:
    """Check a weight before it is rounded.

    Raises:
        UsageError: The weight is not a matrix or a stack of matrices.
        CheckpointError: The weight holds NaN or infinity.
    """
    check_axes(weight, name)
    check_finite(weight, name)


def check_axes(weight: Tensor, name: str) -> None:
    """Check that a weight is a matrix or a stack of matrices.

    Raises:
        UsageError: It is neither.
    """
    if weight.dim() not in {2, 3}:
        raise UsageError(
            f"{name}: shape {tuple(weight.shape)} is neither a matrix nor a stack of matrices",
            hint="leave this tensor float",
        )


def check_finite(weight: Tensor, name: str) -> None:
    """Check for NaN and infinity. Both show in the minimum or maximum, which takes a twentieth of the time of isfinite.

    Raises:
        CheckpointError: The weight holds NaN or infinity.
    """
    if weight.numel() and not all(bool(value.isfinite()) for value in weight.aminmax()):
        raise CheckpointError(
            f"{name}: holds NaN or infinity",
            hint="the checkpoint is damaged or its weights overflowed; download or save it again",
        )


def matrices(weight: Tensor) -> list[Tensor]:
    """The matrices [N, K] of a stack, or the matrix itself, as a list."""
    return list(weight) if weight.dim() == 3 else [weight]


def assemble(
    parts: list[tuple[Tensor, Tensor, Tensor]],
    fmt: IntegerFormat,
    shape: torch.Size,
    name: str,
) -> QuantizedTensor:
    """Make one quantized tensor of `shape` from codes, scales and zero points of each matrix.

    Raises:
        CheckpointError: A scale overflowed its dtype.
    """
    codes, scales, zero_points = (torch.stack(list(column)) for column in zip(*parts, strict=True))
    if len(shape) == 2:
        codes, scales, zero_points = codes[0], scales[0], zero_points[0]
    stored = scales.to(fmt.scale_type.dtype)
    check_scales(stored, name)
    return QuantizedTensor(fmt, codes, stored, None if fmt.symmetric else zero_points.to(torch.int8))


def relative(error: float, norm: float) -> float:
    """`error / norm`; 0 if both are 0."""
    return error / norm if norm > 0 else 0.0
