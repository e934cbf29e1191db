"""GPTQ: rounds column by column and adjusts the remaining columns to compensate for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv:2210.17323),
with activation order, static groups (scales are chosen before the first column is rounded, so that the order needs
no index at run time), scales of least squared error, and rounds of refinement afterwards (see `refine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.common.errors import UsageError
from moec.quantize.formats import IntegerFormat
from moec.quantize.methods.coordinate_descent import Rounded, refine
from moec.quantize.methods.hessian import Hessian
from moec.quantize.methods.rounding import (
    MatrixReport,
    Method,
    RoundingResult,
    assemble,
    check_weight,
    matrices,
    relative,
)
from moec.quantize.methods.scales import ClipSearch, choose_scales, encode
from moec.quantize.methods.tensors import grouped

# Number of weights that are rounded together (16 MiB in fp32): large enough to keep all cores busy with each column,
# small enough that a stack larger than memory is never copied as a whole.
BATCH = 1 << 22


@dataclass(frozen=True)
class GptqOptions:
    """Options of GPTQ.

    Attributes:
        damping: Added to the diagonal of the Hessian, as a fraction of the diagonal's mean.
        activation_order: Whether to round the columns with the largest inputs first.
        clip: Clip ratios to try for each group.
        refinements: Number of rounds of refinement after GPTQ.
        update_block: Number of columns whose errors are collected before they are applied to the others.
        minimum_tokens: A matrix that has seen fewer calibration tokens is rounded to nearest.

    Raises:
        UsageError: A value is out of range.
    """

    damping: float = 0.01
    activation_order: bool = True
    clip: ClipSearch = field(default_factory=ClipSearch)
    refinements: int = 1
    update_block: int = 64
    minimum_tokens: int = 128

    def __post_init__(self) -> None:
        valid = {
            "damping": self.damping > 0,
            "refinements": self.refinements >= 0,
            "update_block": self.update_block > 0,
            "minimum_tokens": self.minimum_tokens > 0,
        }
        for option, holds in valid.items():
            if not holds:
                raise UsageError(f"GPTQ option {option}={getattr(self, option)} is out of range")


def gptq(
    weight: Tensor,
    hessians: Sequence[Hessian],
    fmt: IntegerFormat,
    *,
    name: str,
    options: GptqOptions | None = None,
) -> RoundingResult:
    """Quantize a matrix, or each expert of a stack with its own Hessian, to minimise the output error.

    The result is bit-identical for the same inputs and the same number of threads.

    Args:
        weight: Float weights, any float dtype, [N, K] or [E, N, K].
        hessians: One per matrix, of dimension K.
        fmt: The format; "auto" blocks are resolved here.
        name: Name of the tensor, for errors.
        options: Options; the defaults if None.

    Returns:
            The tensor and one report per matrix, with a reason if it was rounded to nearest.

    Raises:
        UsageError: The block does not divide K, or the tensor is not a matrix or a stack of them.
        CheckpointError: The tensor holds NaN or infinity, or is too large for its scale dtype.
    """
    options = options or GptqOptions()
    check_weight(weight, name)
    resolved = fmt.resolve(weight.shape[-1], name)
    stacked = matrices(weight)
    if len(stacked) != len(hessians):
        raise ValueError(f"{name}: {len(stacked)} matrices, {len(hessians)} Hessians")
    enough = [hessian.tokens >= options.minimum_tokens for hessian in hessians]
    size = max(1, BATCH // stacked[0].numel())
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    reports: dict[int, MatrixReport] = {}
    for wanted in (True, False):
        members = [index for index, value in enumerate(enough) if value is wanted]
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            source = torch.stack([stacked[index] for index in batch]).to(torch.float32)
            means = torch.stack([hessians[index].mean() for index in batch])
            codes, scales, zero_points = (_quantize if wanted else _nearest)(source, means, resolved, options)
            errors = _errors(source, means, codes, scales, zero_points)
            for place, index in enumerate(batch):
                parts[index] = (codes[place].to(torch.int8), scales[place], zero_points[place])
                reports[index] = _report(hessians[index].tokens, errors[place], options)
    count = range(len(stacked))
    tensor = assemble([parts[index] for index in count], resolved, weight.shape, name)
    return RoundingResult(tensor, tuple(reports[index] for index in count))


def _report(tokens: int, error: float, options: GptqOptions) -> MatrixReport:
    if tokens >= options.minimum_tokens:
        return MatrixReport(Method.GPTQ, tokens, error)
    reason = f"{tokens} calibration tokens, fewer than {options.minimum_tokens}"
    return MatrixReport(Method.RTN, tokens, error, reason)


def _nearest(
    weight: Tensor, hessian: Tensor, fmt: IntegerFormat, options: GptqOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a batch [B, N, K] to nearest: codes [B, N, K], scales and zero points [B, N, G], all fp32."""
    del hessian
    groups = grouped(weight, fmt.block_length(weight.shape[-1]))
    scales, zero_points = choose_scales(groups, fmt, options.clip)
    codes = encode(groups, scales.unsqueeze(-1), zero_points.unsqueeze(-1), fmt)
    return codes.flatten(-2), scales, zero_points


def _quantize(
    weight: Tensor, hessian: Tensor, fmt: IntegerFormat, options: GptqOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ on a batch [B, N, K] with Hessians [B, K, K]: codes [B, N, K], scales, zero points [B, N, G], all fp32."""
    block = fmt.block_length(weight.shape[-1])
    scales, zero_points = choose_scales(grouped(weight, block), fmt, options.clip)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    if options.activation_order:
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
    else:
        order = torch.arange(weight.shape[-1]).expand_as(diagonal)
    # If all inputs are zero, there is nothing to minimise; with the identity, GPTQ rounds to nearest.
    mean = diagonal.mean(-1)[:, None, None]
    identity = torch.eye(weight.shape[-1]).expand_as(hessian)
    normal = torch.where(mean > 0, hessian / mean, identity) + options.damping * identity

    rows = order.unsqueeze(-1)
    factor = _inverse_factor(normal.gather(1, rows.expand_as(normal)).gather(2, rows.mT.expand_as(normal)))
    # From here on, columns come first, so that each is contiguous in memory.
    rows = rows.expand(weight.mT.shape)
    columns, spread = (tensor.mT.gather(1, rows) for tensor in (weight, scales.repeat_interleave(block, -1)))
    shift = zero_points.repeat_interleave(block, -1).mT.gather(1, rows)
    ordered = _round_columns(columns, factor, spread, shift, fmt, options.update_block)
    codes = torch.empty_like(ordered).scatter_(1, rows, ordered).mT.contiguous()
    rounded = Rounded(codes, scales, zero_points, fmt)
    for _ in range(options.refinements):
        rounded = refine(weight, normal, rounded, options.update_block)
    return rounded.codes, rounded.scales, zero_points


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1, for positive definite H [B, K, K].

    With J the reversal of rows or columns and J H J = L L^T, U = J L^-1 J. This needs one Cholesky factorisation, where
    the paper needs two and an inverse. If rounding made H indefinite, the damping is increased until H is definite.
    """
    identity = torch.eye(hessian.shape[-1])
    reverse = hessian.flip(-1, -2)
    extra = torch.zeros(len(hessian), 1, 1)
    while True:
        lower, failed = torch.linalg.cholesky_ex(reverse + extra * identity)
        if not bool(failed.any()):
            break
        extra = torch.where((failed > 0)[:, None, None], (extra * 10).clamp(min=0.01), extra)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return inverse.flip(-1, -2)


def _round_columns(
    columns: Tensor, factor: Tensor, scales: Tensor, zero_points: Tensor, fmt: IntegerFormat, update_block: int
) -> Tensor:
    """GPTQ's loop over `columns` [B, K, N], which it overwrites; returns codes. All tensors are [B, K, N]."""
    codes = torch.empty_like(columns)
    for start in range(0, columns.shape[1], update_block):
        part = slice(start, start + update_block)
        local, triangle = columns[:, part], factor[:, part, part]
        errors = torch.empty_like(local)
        for step in range(local.shape[1]):
            column, scale, zero_point = local[:, step], scales[:, start + step], zero_points[:, start + step]
            code = encode(column, scale, zero_point, fmt)
            error = (column - (code - zero_point) * scale) / triangle[:, step, step, None]
            local[:, step + 1 :] -= triangle[:, step, step + 1 :, None] * error[:, None]
            codes[:, start + step], errors[:, step] = code, error
        columns[:, start + update_block :] -= factor[:, part, start + update_block :].mT @ errors
    return codes


def _errors(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor) -> list[float]:
    """Relative squared error of each matrix: of its outputs, or of its weights if the Hessian is zero."""
    groups = grouped(codes, codes.shape[-1] // scales.shape[-1]) - zero_points.unsqueeze(-1)
    change = (groups * scales.unsqueeze(-1)).flatten(-2) - weight
    seen = hessian.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
    metric = torch.where(seen[:, None, None], hessian, torch.eye(hessian.shape[-1]))
    lost, norm = (((matrix @ metric) * matrix).sum((-2, -1)).tolist() for matrix in (change, weight))
    return [relative(max(error, 0.0), size) for error, size in zip(lost, norm, strict=True)]
