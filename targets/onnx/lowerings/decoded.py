"""Quantized weights as `DequantizeLinear` before `MatMul`, for runtimes whose kernels for codes are slow.

In WebAssembly, a product with an int4 matrix by `MatMulNBits` takes 12 times as long as one with floats, since every
call decodes the whole matrix, and experts by `QMoE` take 6 times as long. In this form the session chooses: with the
option `session.disable_quant_qdq` it decodes each matrix once, when it opens the model, into four bytes per weight;
without, it fuses both ops to `MatMulNBits` and keeps the codes.

```
x -> MatMul(DequantizeLinear(codes [K, N] int4 or int8, scales [K / block, N], axis=0))
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from moec.compiler.ir.weights import LazyTensor
from moec.quantize.lazy import Quantized
from moec.targets.onnx.context import Context
from moec.targets.onnx.lowerings.quantized import (
    Product,
    pack,
    packed_product,
    packed_products,
    product_with,
    stored_entry,
)

ENTRY: Mapping[str, Any] = {"signed": True, "transposed": True}
"""How the codes of this form are stored; see `moec.targets.onnx.stored.TABLE`."""


def is_decoded(ctx: Context, *weights: Quantized) -> bool:
    """Whether the dialect takes this form for these weights; those with zero points stay with the kernels."""
    return (
        ctx.dialect.decode
        and bool(weights)
        and all(weight.format.symmetric and weight.shape[-2] % 2 == 0 for weight in weights)
    )


def coded_product(ctx: Context, x: ir.Value, weights: Mapping[str, Quantized], dtype: torch.dtype) -> ir.Value:
    """`x @ weight.T` for several weights [N, K] of one format, with outputs concatenated, in the dialect's form."""
    if not is_decoded(ctx, *weights.values()):
        return packed_product(ctx, x, weights, dtype)
    # A name of its own: a tied embedding is also a table, whose scales lie the other way round.
    name, stores = "+".join(weights) + ".decoded", list(weights.values())
    first = 0
    for own_name, own in weights.items():
        ctx.others[own_name] = stored_entry(own, own.block, first=first, base=name, **ENTRY)
        first += own.shape[0]
    return ctx.op("MatMul", x, _decoded(ctx, name, stores, dtype))


def expert_products(ctx: Context, name: str, stack: Quantized, dtype: torch.dtype) -> list[Product]:
    """The products with each matrix of a stack of experts [E, N, K], in the dialect's form."""
    if not is_decoded(ctx, stack):
        return packed_products(ctx, name, stack, dtype)
    ctx.experts[name] = stored_entry(stack, stack.block, base=f"{name}.{{}}", **ENTRY)
    members = stack.members()
    for member in members:
        # All codes are written before the scales, which each member keeps until then.
        _codes(ctx, member.name, [member])
    matrices = [_decoded(ctx, member.name, [member], dtype) for member in members]
    return [product_with(ctx, matrix) for matrix in matrices]


@dataclass(frozen=True)
class _Turned(LazyTensor):
    """Matrices side by side, transposed: packed codes [K, N] (`bits`), or scales [G, N]. All are in memory at once."""

    parts: tuple[Quantized, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int = 0

    def read(self) -> Tensor:
        if not self.bits:
            scales = [part.scale_rows(0, part.shape[0]).scales for part in self.parts]
            return torch.cat(scales).T.to(self.dtype).contiguous()
        codes = torch.cat([part.quantized_rows(0, part.shape[0]).codes for part in self.parts])
        codes = codes.T.contiguous().view(torch.uint8)
        return pack(codes & 15 if self.bits == 4 else codes, self.bits)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]

    def chunks(self, limit: int = 0) -> Iterator[Tensor]:  # noqa: ARG002 - a slice costs as much as the whole
        yield self.read()


def _codes(ctx: Context, name: str, parts: Sequence[Quantized]) -> ir.Value:
    bits = parts[0].format.bits
    count, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    turned = _Turned(tuple(parts), (columns, count * bits // 8), torch.uint8, bits)
    kind = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    return ctx.initializer(f"{name}.codes", turned, packed=(kind, (columns, count)))


def _decoded(ctx: Context, name: str, parts: Sequence[Quantized], dtype: torch.dtype) -> ir.Value:
    block = parts[0].block
    shape = (parts[0].shape[1] // block, sum(part.shape[0] for part in parts))

    def decode() -> ir.Value:
        scales = ctx.initializer(f"{name}.scales", _Turned(tuple(parts), shape, dtype))
        return ctx.op("DequantizeLinear", _codes(ctx, name, parts), scales, axis=0, block_size=block)

    value: ir.Value = ctx.shared(("decoded", name), decode)
    return value
