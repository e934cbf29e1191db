"""The judge's own rounding of weights to nearest, after `docs/quantization.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CLASSES = ("experts_gate_up", "experts_down", "shared_expert", "attention", "embedding", "lm_head")
_ENDS = ("embedding", "lm_head")
_ROWS, _BLOCKS = "int8:channel:fp32:int8-dynamic", "int4:auto32:bf16:int8-dynamic"
_SCALES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def formats(target: str, wanted: str | Mapping[str, Any]) -> dict[str, str]:
    """Tensor class -> format, for the format of a recipe."""
    if not isinstance(wanted, str):
        return dict(wanted["formats"])
    if target == "tflite" and wanted == "int8":
        return dict.fromkeys(CLASSES, _ROWS)
    if target == "tflite" and wanted == "int4":
        return {name: _ROWS if name in _ENDS else _BLOCKS for name in CLASSES}
    found = dict.fromkeys(CLASSES, wanted)
    if wanted.startswith("int4"):
        words = [word for word in wanted.split(":")[1:] if word != "asym"]
        found |= dict.fromkeys(_ENDS, ":".join(["int8", *words]))
    return found


BORDER = 1e-5
"""Distance from the middle between two codes within which the order of operations decides, in codes."""


def rounded(weight: Tensor, form: str, shift: float = 0.0) -> Tensor:
    """The values that codes of a format stand for.

    Args:
        weight: float32, [..., N, K]; blocks lie along the last axis.
        form: Text of the format.
        shift: Added before rounding, in codes: with `BORDER` and `-BORDER`, weights in the middle of two codes, such as
            those of a bfloat16 checkpoint often are, get one or the other.
    """
    kind, *words = form.split(":")
    if kind == "none":
        return weight
    if kind == "fp16":
        return weight.half().float()
    low, high = (-8, 7) if kind == "int4" else (-127, 127)
    block = _block(words, weight.shape[-1])
    groups = weight.reshape(*weight.shape[:-1], -1, block)
    scale_type = next((_SCALES[word] for word in words if word in _SCALES), torch.float16)
    largest, smallest = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    if "asym" in words:
        largest, smallest = largest.clamp(min=0), smallest.clamp(max=0)
        scale = _stored((largest - smallest) / (high - low), scale_type)
        zero = torch.round(low - smallest / scale).clamp(low, high)
    else:
        scale = _stored(torch.maximum(largest / high, smallest / low), scale_type)
        zero = torch.zeros_like(scale)
    codes = (torch.round(groups / scale + shift) + zero).clamp(low, high)
    return ((codes - zero) * scale).reshape(weight.shape)


def _stored(scale: Tensor, scale_type: torch.dtype) -> Tensor:
    scale = scale.to(scale_type).float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _block(words: list[str], width: int) -> int:
    """Number of weights that share a scale."""
    if "channel" in words:
        return width
    given = [int(word) for word in words if word.isdecimal()]
    if given:
        return given[0]
    sizes = (32,) if "auto32" in words else (128, 64, 32)
    return next((size for size in sizes if width % size == 0), width)
