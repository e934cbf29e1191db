"""bitsandbytes: NF4 and FP4 (a table of 16 values, a scale for each block of values in row-major order), and LLM.int8.

4 bits: `weight` uint8 [N * K / 2, 1] with the upper half of a byte first, `weight.quant_map` [16], `weight.absmax` for
each block, and JSON in `weight.quant_state.bitsandbytes__nf4`. With double quantization, absmax is an index into
`weight.nested_quant_map` [256], scaled by `weight.nested_absmax` for each block of absmax, plus an offset
(bitsandbytes/functional.py, QuantState). 8 bits: `weight` int8 [N, K] and `SCB` [N]; `weight = code * SCB / 127`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moec.compiler.frontend.stored.base import Parts, Rule, StoredFormat, unpack
from moec.compiler.ir.encoded_weights import Encoded, FromFunction, PerBlock
from moec.compiler.ir.weights import LazyTensor

_STATE = "weight.quant_state.bitsandbytes__"
_COMPANIONS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
)


def _decode(parts: Parts, kind: str) -> LazyTensor:
    state = _state(parts, f"{_STATE}{kind}")
    shape, size = tuple(state["shape"]), int(state["blocksize"])
    count = math.prod(shape)
    packed = parts.expect("weight", ((count + 1) // 2, 1), (1, (count + 1) // 2), dtypes=(torch.uint8,))
    table = parts.expect("weight.quant_map", (16,))
    if parts["weight.absmax"].shape != (-(-count // size),):
        raise parts.misfit("weight.absmax")
    inner = math.prod(shape[1:])

    def codes(start: int, stop: int) -> Tensor:
        first, last = start * inner // 2, -(-stop * inner // 2)
        data = packed.rows(first, last) if packed.shape[1] == 1 else packed.read()[0, first:last, None]
        # Both halves of a byte, the upper one first.
        values = unpack(data, 4).reshape(-1, 2).flip(-1).flatten()
        values = values[start * inner - 2 * first : stop * inner - 2 * first]
        return table.read().to(torch.float32)[values.to(torch.int32)].reshape(stop - start, *shape[1:])

    def scales(start: int, stop: int) -> Tensor:
        first, last = start * inner // size, -(-stop * inner // size)
        spread = _absmax(parts, state, first, last).repeat_interleave(size)
        return spread[start * inner - first * size : stop * inner - first * size].reshape(stop - start, *shape[1:])

    # Blocks continue across rows, so each element gets its own scale.
    each = PerBlock(FromFunction(shape, torch.float32, scales), shape, (1, 1))
    return Encoded(kind, 4, False, FromFunction(shape, torch.float32, codes), each)


def _state(parts: Parts, rest: str) -> Mapping[str, Any]:
    try:
        state: Mapping[str, Any] = json.loads(parts[rest].read().numpy().tobytes())
        sizes = (*state["shape"], state["blocksize"], state.get("nested_blocksize", 1))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise parts.misfit(rest) from error
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise parts.misfit(rest)
    return state


def _absmax(parts: Parts, state: Mapping[str, Any], first: int, last: int) -> Tensor:
    """Largest magnitudes (absmax) of blocks [first, last), float32 [last - first]."""
    stored = parts["weight.absmax"].rows(first, last)
    if parts.get("weight.nested_absmax") is None:
        return stored.to(torch.float32)
    size = int(state["nested_blocksize"])
    outer = parts["weight.nested_absmax"].rows(first // size, -(-last // size)).to(torch.float32)
    factors = outer.repeat_interleave(size)[first % size :][: last - first]
    table = parts["weight.nested_quant_map"].read().to(torch.float32)
    return table[stored.to(torch.int32)] * factors + float(state["nested_offset"])


def _decode_int8(parts: Parts) -> LazyTensor:
    weight = parts.expect("weight", dtypes=(torch.int8,))
    scb = parts.expect("SCB", weight.shape[:1])
    if len(weight.shape) != 2:
        raise parts.misfit("weight")
    scales = FromFunction(
        (weight.shape[0], 1), torch.float32, lambda a, b: scb.rows(a, b).to(torch.float32)[:, None] / 127
    )
    return Encoded("bitsandbytes int8", 8, True, weight, PerBlock(scales, weight.shape, (1, weight.shape[1])))


BITSANDBYTES = StoredFormat(
    (
        Rule(f"{_STATE}nf4", _COMPANIONS, "weight", lambda parts: _decode(parts, "nf4")),
        Rule(f"{_STATE}fp4", _COMPANIONS, "weight", lambda parts: _decode(parts, "fp4")),
        Rule("SCB", ("weight", "weight_format"), "weight", _decode_int8),
    )
)
