"""Weight layouts that the MoE kernels of ONNX Runtime need."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ir.experts import Gate
from moec.compiler.ir.weights import LazyTensor, Mapped


def interleave(value: Tensor) -> Tensor:
    """Reorder axis 1 of [n, 2I, ...] from gate0, gate1, ..., up0, up1, ... to gate0, up0, gate1, up1, ..."""
    gate, up = value.chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).reshape(value.shape)


def interleaved_rows(tensor: LazyTensor) -> LazyTensor:
    """`interleave`, lazily, one expert at a time."""
    return Mapped(tensor, interleave, tensor.shape, tensor.dtype)


def kernel_layout(tensor: LazyTensor, gate: Gate, *, first: bool) -> LazyTensor:
    """The layout of the kernels: [E, out, in]; gate and up interleaved if this is the `first` projection."""
    return interleaved_rows(tensor) if first and gate.gated and not gate.interleaved else tensor
