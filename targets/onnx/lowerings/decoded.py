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
from moec.targets.onnx.lowerings.quantized import pack, packed_product, stored_entry

ENTRY: Mapping[str, Any] = {"signed": True, "transposed": True}
"""How the codes of this form are stored; see `moec.targets.onnx.stored.TABLE`."""


def is_decoded(ctx: Context, *weights: Quantized) -> bool:
    """Whether the dialect takes this form for these weights; those with zero points stay with the kernels."""
    return ctx.dialect.decode and all(weight.format.symmetric and weight.shape[-2] % 2 == 0 for weight in weights)


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
    return ctx.op("MatMul", x, _decoded(ctx, name, [_Part(own, None) for own in stores], dtype))


def matrices(ctx: Context, name: str, stack: Quantized, dtype: torch.dtype) -> list[ir.Value]:
    """The matrices [K, N] of a stack of experts [E, N, K]."""
    ctx.experts[name] = stored_entry(stack, stack.block, base=f"{name}.{{}}", **ENTRY)
    parts = [_Part(stack, index) for index in range(stack.shape[0])]
    for index, part in enumerate(parts):
        # All codes are written before the scales, which the stack keeps until then.
        _codes(ctx, f"{name}.{index}", [part])
    return [_decoded(ctx, f"{name}.{index}", [part], dtype) for index, part in enumerate(parts)]


@dataclass(frozen=True)
class _Part:
    """A quantized matrix [N, K]: a tensor of its own, or one of a stack (`index`)."""

    source: Quantized
    index: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape[-2:])

    def codes(self) -> Tensor:
        """Signed codes [N, K], int8."""
        return self._own(self.source.quantized_rows(*self._rows).codes)

    def scales(self) -> Tensor:
        """Scales [N, G]."""
        return self._own(self.source.scale_rows(*self._rows).scales)

    @property
    def _rows(self) -> tuple[int, int]:
        return (0, self.source.shape[0]) if self.index is None else (self.index, self.index + 1)

    def _own(self, value: Tensor) -> Tensor:
        return value if self.index is None else value[0]


@dataclass(frozen=True)
class _Turned(LazyTensor):
    """Matrices side by side, transposed: packed codes [K, N] (`bits`), or scales [G, N]. All are in memory at once."""

    parts: tuple[_Part, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int = 0

    def read(self) -> Tensor:
        if not self.bits:
            return torch.cat([part.scales() for part in self.parts]).T.to(self.dtype).contiguous()
        codes = torch.cat([part.codes() for part in self.parts]).T.contiguous().view(torch.uint8)
        return pack(codes & 15 if self.bits == 4 else codes, self.bits)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]

    def chunks(self, limit: int = 0) -> Iterator[Tensor]:  # noqa: ARG002 - a slice costs as much as the whole
        yield self.read()


def _codes(ctx: Context, name: str, parts: Sequence[_Part]) -> ir.Value:
    bits = parts[0].source.format.bits
    count, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    turned = _Turned(tuple(parts), (columns, count * bits // 8), torch.uint8, bits)
    kind = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    return ctx.initializer(f"{name}.codes", turned, packed=(kind, (columns, count)))


def _decoded(ctx: Context, name: str, parts: Sequence[_Part], dtype: torch.dtype) -> ir.Value:
    block = parts[0].source.block
    shape = (parts[0].shape[1] // block, sum(part.shape[0] for part in parts))

    def decode() -> ir.Value:
        scales = ctx.initializer(f"{name}.scales", _Turned(tuple(parts), shape, dtype))
        return ctx.op("DequantizeLinear", _codes(ctx, name, parts), scales, axis=0, block_size=block)

    value: ir.Value = ctx.shared(("decoded", name), decode)
    return value
