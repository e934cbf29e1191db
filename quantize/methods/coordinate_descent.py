"""Reduces the output error of a quantized matrix: refits its scales by least squares, then its codes one at a time.

Both steps minimise trace(D H D^T), where D is the change of the weights, and never increase it. The scales of a row
solve a linear system with its codes fixed. Then each code in turn is set to its best value with all others fixed
(cyclic coordinate descent, as in QuantEase, arXiv:2309.01885).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.quantize.formats import IntegerFormat
from moec.quantize.methods.scales import encode, round_scales
from moec.quantize.methods.tensors import grouped


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded batch of matrices, all in fp32.

    Attributes:
        codes: Codes [B, N, K].
        scales: Scales [B, N, G].
        zero_points: Zero points [B, N, G].
        format: The format.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    format: IntegerFormat

    @property
    def block(self) -> int:
        """Number of columns that share a scale."""
        return self.codes.shape[-1] // self.scales.shape[-1]


def refine(weight: Tensor, hessian: Tensor, rounded: Rounded, update_block: int) -> Rounded:
    """One round on a batch of matrices: new scales, then new codes; zero points do not change.

    Args:
        weight: Float weights [B, N, K], fp32.
        hessian: Damped Hessians [B, K, K], fp32.
        rounded: The current rounding of `weight`.
        update_block: Number of columns whose changes are collected before they are applied to the others.
    """
    target = weight @ hessian
    rounded = replace(rounded, scales=_refit_scales(weight, target, hessian, rounded))
    return replace(rounded, codes=_descend(target, hessian, rounded, update_block))


def _refit_scales(weight: Tensor, target: Tensor, hessian: Tensor, rounded: Rounded) -> Tensor:
    """Least-squares scales [B, N, G] of each row; a row keeps its old scales if the new ones are not better."""
    scales = rounded.scales
    groups = grouped(rounded.codes, rounded.block) - rounded.zero_points.unsqueeze(-1)
    count, block = groups.shape[-2:]
    flat = groups.flatten(-2)
    normal = torch.empty(*groups.shape[:-1], count)
    for group in range(count):
        product = groups[:, :, group] @ hessian[:, group * block : (group + 1) * block]
        normal[..., group] = grouped(product * flat, block).sum(-1)
    right = grouped(target * flat, block).sum(-1)
    # A small ridge toward the old scales keeps the system regular; a group whose codes are all 0 keeps its scale.
    ridge = normal.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).mul_(1e-6).clamp_(min=1e-20)
    normal.diagonal(dim1=-2, dim2=-1).add_(ridge)
    solved = torch.linalg.solve(normal, right + ridge * scales)
    # Codes would not fit a scale far from the old one, and runtimes do not support negative scales.
    sane = (solved > scales / 2) & (solved < scales * 2)
    solved = round_scales(torch.where(sane, solved, scales), rounded.format.scale_type)
    before, after = (_row_errors(weight, hessian, groups * candidate.unsqueeze(-1)) for candidate in (scales, solved))
    return torch.where((after < before).unsqueeze(-1), solved, scales)


def _row_errors(weight: Tensor, hessian: Tensor, restored: Tensor) -> Tensor:
    change = weight - restored.flatten(-2)
    return ((change @ hessian) * change).sum(-1)


def _descend(target: Tensor, hessian: Tensor, rounded: Rounded, update_block: int) -> Tensor:
    """One sweep over the columns; `target` is weight @ hessian. Returns new codes [B, N, K]."""
    # Columns first, [B, K, N], so that each is contiguous in memory.
    spread, shift = (
        tensor.repeat_interleave(rounded.block, -1).mT.contiguous() for tensor in (rounded.scales, rounded.zero_points)
    )
    result = rounded.codes.mT.contiguous()
    restored = (result - shift) * spread
    residual = target.mT - hessian @ restored
    for start in range(0, result.shape[1], update_block):
        part = slice(start, start + update_block)
        local, square = residual[:, part].contiguous(), hessian[:, part, part]
        moves = torch.empty_like(local)
        for step in range(local.shape[1]):
            column = start + step
            best = restored[:, column] + local[:, step] / square[:, step, step, None]
            code = encode(best, spread[:, column], shift[:, column], rounded.format)
            move = (code - result[:, column]) * spread[:, column]
            local -= square[:, step, :, None] * move[:, None]
            result[:, column], moves[:, step] = code, move
        residual -= hessian[:, part].mT @ moves
    return result.mT.contiguous()
