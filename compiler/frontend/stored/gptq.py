"""GPTQ: integers of 2, 4 or 8 bits with a scale and a zero point for each group of columns.

`qweight` [K * bits / 32, N] int32, packed along K; `qzeros` [G, N * bits / 32] int32, packed along N; `scales` [G, N];
`g_idx` [K], the group of each column of the weight, which is not in ascending order with `desc_act`.
`weight[n, k] = scales[g, n] * (q[k, n] - z[g, n])`. `checkpoint_format: gptq` stores zero points minus one, `gptq_v2`
as they are (auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py, gptqmodel/nn_modules/qlinear/torch.py).
"""

from __future__ import annotations

import torch

from moec.compiler.frontend.stored.base import Parts, Rule, Settings, StoredFormat, packed_matrices, signed, unpack
from moec.compiler.ir.encoded_weights import Encoded, FromFunction, PerBlock
from moec.compiler.ir.weights import LazyTensor, swap_last

BITS = (2, 4, 8)
FORMATS = ("gptq", "gptq_v2")


def _decode(parts: Parts) -> LazyTensor:
    qweight, qzeros, scales = packed_matrices(parts)
    groups, rows = scales.shape
    bits = qzeros.shape[1] * 32 // rows
    if bits not in BITS:
        raise parts.unsupported(f"moec reads GPTQ of {', '.join(map(str, BITS))} bits, not of {bits} bits")
    columns = qweight.shape[0] * 32 // bits
    if qweight.shape[1] != rows or qzeros.shape[0] != groups:
        raise parts.misfit("qweight")
    offset = 0 if _format(parts.settings) == "gptq_v2" else 1

    def codes(start: int, stop: int) -> torch.Tensor:
        return signed(unpack(qweight.read()[:, start:stop].T, bits), bits)

    def zeros(start: int, stop: int) -> torch.Tensor:
        points = unpack(qzeros.read(), bits).T[start:stop]
        return points.to(torch.int16) + (offset - (1 << (bits - 1)))

    shape = (rows, columns)
    index = None
    if parts.get("g_idx") is not None and groups > 1:
        index = parts.expect("g_idx", (columns,), dtypes=(torch.int32, torch.int64))
    size = int(parts.settings.get("group_size") or -1)
    block = (1, size if size > 0 and -(-columns // size) == groups else -(-columns // groups))
    return Encoded(
        "gptq",
        bits,
        True,
        FromFunction(shape, torch.int8, codes),
        PerBlock(swap_last(scales), shape, block, index),
        PerBlock(FromFunction((rows, groups), torch.int16, zeros), shape, block, index),
    )


def _format(settings: Settings) -> str:
    return str(settings.get("checkpoint_format") or "gptq")


def _refuse(settings: Settings) -> str:
    chosen = "marlin" if settings.get("is_marlin_format") else _format(settings)
    if chosen in FORMATS:
        return ""
    return f"moec reads GPTQ with checkpoint_format {' or '.join(FORMATS)}, not {chosen!r}"


GPTQ = StoredFormat((Rule("qweight", ("qzeros", "scales", "g_idx"), "weight", _decode),), _refuse)
