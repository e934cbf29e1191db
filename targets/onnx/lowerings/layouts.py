"""Layouts that the MoE kernels of ONNX Runtime want."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ir.experts import Gate
from moec.compiler.ir.weights import LazyTensor, Mapped


def interleave(value: Tensor) -> Tensor:
    """[n, 2I, ...] with gate and up one after the other -> gate0, up0, gate1, ... along axis 1."""
    gate, up = value.chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).reshape(value.shape)


def interleaved_rows(tensor: LazyTensor) -> LazyTensor:
    """`interleave`, lazily, one expert at a time."""
    return Mapped(tensor, interleave, tensor.shape, tensor.dtype)


def kernel_layout(tensor: LazyTensor, gate: Gate, *, first: bool) -> LazyTensor:
    """The layout that the kernels want: [E, out, in], gate and up interleaved."""
    return interleaved_rows(tensor) if first and gate.gated and not gate.interleaved else tensor
