"""AWQ: 4 bits with a scale and a zero point for each group of columns, as its GEMM kernel reads them.

`qweight` [K, N / 8] int32 and `qzeros` [G, N / 8] int32, packed along N with eight numbers of a word in the order 0, 2,
4, 6, 1, 3, 5, 7; `scales` [G, N]. `weight[n, k] = scales[g, n] * (q[k, n] - z[g, n])`
(awq/modules/linear/gemm.py, awq/utils/packing_utils.py of AutoAWQ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.frontend.stored.base import Parts, Rule, Settings, StoredFormat, packed_matrices, signed, unpack
from moec.compiler.ir.encoded_weights import Encoded, FromFunction, PerBlock
from moec.compiler.ir.weights import LazyTensor, swap_last

BITS = 4
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position in a word, from its lowest bits, of the i-th number along the axis."""


def _unpacked(words: Tensor, start: int, stop: int) -> Tensor:
    """Unpack columns [start, stop) of words [R, N / 8], transposed: signed codes int8 [stop - start, R]."""
    first, last = start // 8, -(-stop // 8)
    codes = unpack(words[:, first:last], BITS).reshape(len(words), last - first, 8)[..., list(ORDER)].flatten(-2)
    return signed(codes[:, start - 8 * first : stop - 8 * first].T.contiguous(), BITS)


def _decode(parts: Parts) -> LazyTensor:
    qweight, qzeros, scales = packed_matrices(parts)
    groups, rows = scales.shape
    columns = qweight.shape[0]
    if qweight.shape[1] * 8 != rows or qzeros.shape != (groups, rows // 8) or columns % groups:
        raise parts.misfit("qweight")
    shape, block = (rows, columns), (1, columns // groups)
    return Encoded(
        "awq",
        BITS,
        True,
        FromFunction(shape, torch.int8, lambda start, stop: _unpacked(qweight.read(), start, stop)),
        PerBlock(swap_last(scales), shape, block),
        PerBlock(
            FromFunction((rows, groups), torch.int8, lambda start, stop: _unpacked(qzeros.read(), start, stop)),
            shape,
            block,
        ),
    )


def _refuse(settings: Settings) -> str:
    version, bits = str(settings.get("version") or "gemm").lower(), settings.get("bits", settings.get("w_bit", BITS))
    if version != "gemm":
        return f"moec reads AWQ of version gemm, not {version!r}"
    return "" if bits == BITS else f"moec reads AWQ of {BITS} bits, not of {bits} bits"


AWQ = StoredFormat((Rule("qweight", ("qzeros", "scales"), "weight", _decode),), _refuse)
