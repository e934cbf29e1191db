"""Kernel of convolution."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from moec.targets.coreml.executor.kernel import Args, Kernel

if TYPE_CHECKING:
    from moec.targets.coreml.executor.dtypes import Array


def _padding(args: Args, kernel: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis; `kernel` are the kernel's sizes including dilation."""
    kind, sizes = args.text("pad_type", "valid"), args.array("x").shape[2:]
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        pad = args.integers("pad") or (0, 0) * len(sizes)
        return list(zip(pad[::2], pad[1::2], strict=True))
    if kind not in ("same", "same_lower"):
        raise ValueError(f"unknown pad type {kind!r}")
    # There are ceil(n / stride) results. The extra zero of an odd total goes after the input ("same") or before it.
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sizes, kernel, strides, strict=True)]
    halves = [(total // 2, total - total // 2) for total in totals]
    return [half[::-1] for half in halves] if kind == "same_lower" else halves


def _conv(args: Args) -> Array:
    """[N, C, *sizes] with a weight [C', C / groups, *kernel] -> [N, C', *results]."""
    x, weight, groups = args.array("x"), args.array("weight"), args.integer("groups", 1)
    ones = (1,) * (x.ndim - 2)
    strides, dilations = args.integers("strides") or ones, args.integers("dilations") or ones
    outputs, inputs = weight.shape[:2]
    if inputs * groups != x.shape[1] or outputs % groups:
        raise ValueError(f"{x.shape[1]} channels in {groups} groups do not fit a weight of shape {weight.shape}")
    spans = tuple((size - 1) * gap + 1 for size, gap in zip(weight.shape[2:], dilations, strict=True))
    padded = np.pad(x, [(0, 0), (0, 0), *_padding(args, spans, strides)])
    results = [(n - span) // step + 1 for n, span, step in zip(padded.shape[2:], spans, strides, strict=True)]
    if min(results) < 1:
        raise ValueError(f"a kernel that spans {spans} does not fit into {padded.shape[2:]}")
    taps = weight.reshape(groups, outputs // groups, inputs, -1)
    total = np.zeros((x.shape[0], groups, outputs // groups, *results), padded.dtype)
    for place, offsets in enumerate(itertools.product(*(range(size) for size in weight.shape[2:]))):
        starts = [offset * gap for offset, gap in zip(offsets, dilations, strict=True)]
        window = tuple(
            slice(start, start + (count - 1) * step + 1, step)
            for start, count, step in zip(starts, results, strides, strict=True)
        )
        part = padded[(slice(None), slice(None), *window)].reshape(x.shape[0], groups, inputs, *results)
        total += np.einsum("ngi...,goi->ngo...", part, taps[..., place])
    result = total.reshape(x.shape[0], outputs, *results)
    bias = args.optional("bias")
    return result if bias is None else result + bias.reshape(-1, *ones)


def _conv_macs(args: Args, result: Array) -> int:
    return int(result.size * np.prod(args.array("weight").shape[1:], dtype=np.int64))


KERNELS: dict[str, Kernel] = {"conv": Kernel(_conv, macs=_conv_macs)}
