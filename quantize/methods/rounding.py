"""Round to nearest (RTN), with an optional search for the clip ratio of each group."""

from __future__ import annotations

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
    """What rounding did to one matrix (one expert of a stack).

    Attributes:
        method: How it was rounded.
        tokens: Calibration tokens that this matrix has seen; 0 without calibration.
        error: Squared error over the squared norm: of the outputs on the calibration tokens where there are
            any, else of the weights. 0 for an all-zero matrix.
        reason: Why it is not `GPTQ` although that was asked for; empty otherwise.
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

    Without clipping each weight is off by at most half a scale (and one rounding of fp32).

    Args:
        weight: Float weights, any float dtype, [N, K] or [E, N, K].
        fmt: The format; "auto" blocks are resolved here.
        name: Name of the tensor, for errors.
        clip: Clip ratios to try; none by default.

    Raises:
        UsageError: The block does not divide K, or the tensor is not a matrix or a stack of them.
        CheckpointError: The tensor holds NaN or infinity, or is too large for its scale dtype.
    """
    check_weight(weight, name)
    resolved = fmt.resolve(weight.shape[-1], name)
    parts = [_round_matrix(matrix, resolved, clip) for matrix in matrices(weight)]
    tensor = assemble([(codes, scales, points) for codes, scales, points, _ in parts], resolved, weight.shape, name)
    return RoundingResult(tensor, tuple(MatrixReport(Method.RTN, 0, error) for *_, error in parts))


def _round_matrix(matrix: Tensor, fmt: IntegerFormat, clip: ClipSearch) -> tuple[Tensor, Tensor, Tensor, float]:
    """Codes int8 [N, K], scales [N, G], zero points [N, G] and relative squared error of one matrix."""
    rows, columns = matrix.shape
    block = fmt.block_length(columns)
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales, points = torch.empty(rows, columns // block), torch.empty(rows, columns // block)
    lost = norm = 0.0
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = grouped(matrix[part].to(torch.float32), block)
        scales[part], points[part] = choose_scales(groups, fmt, clip)
        scale, point = scales[part].unsqueeze(-1), points[part].unsqueeze(-1)
        rounded = encode(groups, scale, point, fmt)
        codes[part] = rounded.flatten(-2)
        if not fmt.symmetric:
            rounded.sub_(point)
        change = rounded.mul_(scale).sub_(groups).flatten()
        lost += float(torch.dot(change, change))
        norm += float(torch.dot(groups.flatten(), groups.flatten()))
    return codes, scales, points, relative(lost, norm)


def check_weight(weight: Tensor, name: str) -> None:
    """Check a weight before it is rounded.

    Raises:
        UsageError: Not a matrix or a stack of matrices.
        CheckpointError: NaN or infinity.
    """
    if weight.dim() not in {2, 3}:
        raise UsageError(
            f"{name}: shape {tuple(weight.shape)} is neither a matrix nor a stack of matrices",
            hint="Leave this tensor float.",
        )
    if not _finite(weight):
        raise CheckpointError(
            f"{name}: holds NaN or infinity", hint="The checkpoint is damaged or overflowed; download or save it again."
        )


def _finite(weight: Tensor) -> bool:
    """Whether no value is NaN or infinite; the extremes carry every one, at a twentieth of the time of isfinite."""
    if not weight.numel():
        return True
    low, high = weight.aminmax()
    return bool(low.isfinite() & high.isfinite())


def matrices(weight: Tensor) -> list[Tensor]:
    """The matrices [N, K] of a matrix or stack."""
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
    codes, scales, points = (torch.stack(list(column)) for column in zip(*parts, strict=True))
    if len(shape) == 2:
        codes, scales, points = codes[0], scales[0], points[0]
    stored = scales.to(fmt.scale_type.dtype)
    check_scales(stored, name)
    return QuantizedTensor(fmt, codes, stored, None if fmt.symmetric else points.to(torch.int8))


def relative(error: float, norm: float) -> float:
    """`error / norm`, and 0 where both vanish."""
    return error / norm if norm > 0 else 0.0
