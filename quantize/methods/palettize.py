"""Palettes by k-means: the weights of a group of rows are clustered, and each becomes the index of its centre.

In one dimension, a cluster is an interval of the sorted values. After sorting once, an iteration of Lloyd's algorithm
("Least squares quantization in PCM", 1982) is only a search for the borders and a difference of running sums. The
algorithm finds a local optimum, so it is started several times, and each group keeps the result with the least squared
error. Nothing is random: the same weights give the same palettes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError
from moec.quantize.formats import PaletteFormat, TableFormat
from moec.quantize.methods.tensors import grouped

ITERATIONS = 40
POWERS = (1 / 2, 2 / 3, 5 / 6, 1.0)
"""Starting points: centres at equal steps of the running sum of gap ** power, over gaps between sorted values.

A power of 0 would give each centre the same number of values; 1 gives equal parts of the range. The density of the
optimal centres is the cube root of the density of the values (Panter and Dite, 1951), which corresponds to 2/3.
"""
CHUNK = 1 << 20
"""Number of weights that are clustered at a time, which limits the memory."""


@dataclass(frozen=True, eq=False)
class PalettizedTensor:
    """A palettized matrix, or a stack of them.

    Attributes:
        format: Its format, with the number of rows resolved.
        codes: Index of each weight in its palette, uint8 [..., N, K].
        palettes: fp16 [..., palettes per matrix, entries]; those of `choose_palettes` are sorted.
        scales: Scale per block of columns, fp16 or fp32 [..., N, K / block]; None for a `PaletteFormat`.
    """

    format: PaletteFormat | TableFormat
    codes: Tensor
    palettes: Tensor
    scales: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float tensor [..., N, K], computed in fp32."""
        indices = self.codes.to(torch.int64).reshape(*self.palettes.shape[:-1], -1)
        values = torch.gather(self.palettes.to(torch.float32), -1, indices).reshape(self.codes.shape)
        if self.scales is not None:
            groups = grouped(values, values.shape[-1] // self.scales.shape[-1])
            values = (groups * self.scales.to(torch.float32).unsqueeze(-1)).flatten(-2)
        return values.to(dtype)

    def __getitem__(self, expert: int) -> PalettizedTensor:
        """The matrix of one expert of a stack [E, N, K]."""
        scales = None if self.scales is None else self.scales[expert]
        return PalettizedTensor(self.format, self.codes[expert], self.palettes[expert], scales)


def choose_palettes(weight: Tensor, fmt: PaletteFormat, *, name: str) -> Tensor:
    """Cluster the weights of each group of rows.

    Args:
        weight: Float weights [..., N, K], finite.
        fmt: The format, with the number of rows resolved.
        name: Name of the tensor, for errors.

    Returns:
        Palettes fp16 [..., N / rows, entries], in ascending order.

    Raises:
        CheckpointError: A weight is too large for half precision.
    """
    groups = _groups(weight, fmt)
    flat = groups.reshape(-1, groups.shape[-1])
    step = max(1, CHUNK // flat.shape[-1])
    parts = [_cluster(flat[start : start + step].to(torch.float32), fmt.entries) for start in range(0, len(flat), step)]
    palettes = torch.cat(parts).to(torch.float16)
    if not bool(palettes.isfinite().all()):
        raise CheckpointError(
            f"{name}: its weights are too large for palettes in fp16",
            hint="use a format with fp32 scales (for example int4:32:fp32), or leave the tensor float",
        )
    return palettes.reshape(*groups.shape[:-1], fmt.entries)


def palettize(weight: Tensor, palettes: Tensor, fmt: PaletteFormat) -> PalettizedTensor:
    """Give each weight the index of the nearest entry of its palette; the lower of two equally near ones.

    Args:
        weight: Float weights [..., N, K].
        palettes: fp16 [..., N / rows, entries], in ascending order.
        fmt: The format, with the number of rows resolved.
    """
    groups = _groups(weight, fmt).to(torch.float32)
    codes = torch.searchsorted(_borders(palettes.to(torch.float32)), groups.contiguous(), out_int32=True)
    return PalettizedTensor(fmt, codes.to(torch.uint8).reshape(weight.shape), palettes)


def _groups(weight: Tensor, fmt: PaletteFormat) -> Tensor:
    """[..., N, K] -> [..., N / rows, rows * K]."""
    shared = fmt.palettes(weight.shape[-2])
    return weight.reshape(*weight.shape[:-2], shared, -1)


def _borders(centres: Tensor) -> Tensor:
    """Borders between the intervals of neighbouring centres, [groups, entries - 1]."""
    return ((centres[..., 1:] + centres[..., :-1]) / 2).contiguous()


def _cluster(values: Tensor, entries: int) -> Tensor:
    """Centres [groups, entries] of values [groups, n]: the best result over all starting points."""
    ordered = values.sort(dim=-1).values
    # Double precision, since a cluster's sum is a small difference of two running sums.
    sums = torch.nn.functional.pad(ordered.to(torch.float64).cumsum(-1), (1, 0))
    best, most = ordered.new_zeros(len(ordered), entries), sums.new_full((len(ordered),), -1.0)
    for power in POWERS:
        centres, gain = _start(ordered, entries, power), most
        for _ in range(ITERATIONS):
            centres, gain = _step(ordered, sums, centres)
        better = gain > most
        best, most = torch.where(better.unsqueeze(-1), centres, best), torch.where(better, gain, most)
    return best


def _start(ordered: Tensor, entries: int, power: float) -> Tensor:
    steps = ordered.diff(dim=-1).to(torch.float64).pow_(power).cumsum(-1)
    places = (torch.arange(entries) + 0.5) / entries
    found = torch.searchsorted(steps, (steps[:, -1:] * places).contiguous())
    return ordered.gather(-1, found.clamp(max=ordered.shape[-1] - 1))


def _step(ordered: Tensor, sums: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration: the mean of the values nearest to each centre, and the sum of count * mean ** 2 per group.

    The squared error is the sum of the squared values minus the second result.
    """
    ends = torch.searchsorted(ordered, _borders(centres), right=True)
    ends = torch.nn.functional.pad(ends, (1, 1))
    ends[:, -1] = ordered.shape[-1]
    counts = ends.diff(dim=-1)
    totals = sums.gather(-1, ends).diff(dim=-1)
    means = totals / counts.clamp(min=1)
    # A centre without values does not move, so the centres stay sorted.
    moved = torch.where(counts > 0, means.to(centres.dtype), centres)
    return moved, (totals * means).sum(-1)
