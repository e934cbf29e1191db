"""The Program's tensors in the file: float32, fp16, int8 with a scale per row, int4 with scales per row or block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.formats import Activations, IntegerFormat, PaletteFormat, TableFormat
from moec.quantize.lazy import Quantized
from moec.targets.common.refusals import RefusedError
from moec.targets.tflite.model import Chunk, Weight

CHUNK_BYTES = 1 << 25
INT4_BLOCK = 32
"""XNNPACK's blockwise int4 product needs block sizes that are multiples of this."""

HINT = (
    "LiteRT supports int8:channel and, with --activations int8-dynamic, int4:channel and int4 in blocks; "
    "all without zero points"
)


def format_of(tensor: LazyTensor) -> IntegerFormat | None:
    """The integer format of a quantized `tensor`; None for a float one."""
    return tensor.format if isinstance(tensor, Quantized) else None


def unsupported_reason(form: IntegerFormat | PaletteFormat | TableFormat, width: int) -> str:
    """Why LiteRT does not support a format for rows of `width` weights; empty if it does."""
    if not isinstance(form, IntegerFormat):
        return "LiteRT has no kernel for weights with a lookup table"
    if not form.symmetric:
        return "LiteRT has no kernel for weights with zero points"
    if form.bits == 4 and form.activations is Activations.FLOAT:
        return "LiteRT multiplies int4 weights only with activations that are rounded to int8 (int8-dynamic)"
    block = form.block_length(width)
    if form.bits == 4 and width % 2:
        return f"rows of {width} int4 codes do not fill whole bytes"
    if block == width:
        return ""
    if form.bits == 8:
        return "LiteRT supports int8 weights with one scale per row, but not in blocks"
    return "" if block % INT4_BLOCK == 0 else f"blocks of int4 weights must be multiples of {INT4_BLOCK}"


class Weights:
    """Converts the Program's tensors to `Weight`s, which all signatures share."""

    def __init__(self, program: Program) -> None:
        self._store = program.weights
        self._made: dict[Any, Weight] = {}

    def plain(self, name: str, dtype: torch.dtype) -> Weight:
        """A float tensor.

        Raises:
            LoweringError: The plan quantizes it.
        """
        tensor = self._store[name]
        if (form := format_of(tensor)) is not None:
            reason = f"quantized to {form}, but an op uses it that takes only floats in LiteRT"
            raise RefusedError(name, reason, hint="leave it float in the plan")
        return self._float(self._store.resolve(name), tensor, dtype)

    def transposed(self, name: str, dtype: torch.dtype, axes: tuple[int, ...]) -> Weight:
        """A small float tensor with its axes permuted; -1 in `axes` is a new axis of size 1.

        Raises:
            LoweringError: The plan quantizes it.
        """
        plain, tensor = self.plain(name, dtype), self._store[name]
        stored, order = _stored_dtype(tensor, dtype), [axis for axis in axes if axis >= 0]

        def chunks() -> Iterator[Chunk]:
            yield _bytes(tensor.read().to(stored).permute(order)), None

        shape = tuple(1 if axis < 0 else tensor.shape[axis] for axis in axes)
        return self._once((plain.name, axes), lambda _: Weight(plain.name, shape, plain.dtype, chunks))

    def matrix(self, name: str, dtype: torch.dtype) -> Weight:
        """A matrix [N, K] of a linear or an embedding, in the format of the plan.

        Raises:
            LoweringError: LiteRT cannot express the format.
        """
        tensor = self._store[name]
        if not isinstance(tensor, Quantized):
            return self.plain(name, dtype)
        return self._once(
            self._store.resolve(name),
            lambda key: _quantized(key, tensor.format, tensor.shape, lambda: _row_slices(tensor), name),
        )

    def expert(self, name: str, index: int, dtype: torch.dtype, *, interleaved: bool) -> Weight:
        """The matrix [N, K] (or bias [N]) of one expert of a stack.

        Args:
            name: Name of the stack in the Program.
            index: Index of the expert.
            dtype: dtype in the graph.
            interleaved: Whether gate and up rows alternate in the Program; in the file, all gate rows come first.

        Raises:
            LoweringError: LiteRT cannot express the format.
        """
        tensor, name = self._store[name], self._store.resolve(name)

        def order(value: Tensor) -> Tensor:
            return torch.cat([value[0::2], value[1::2]]) if interleaved else value

        if not isinstance(tensor, Quantized):
            stored = _stored_dtype(tensor, dtype)

            def chunks() -> Iterator[Chunk]:
                yield _bytes(order(tensor.rows(index, index + 1)[0].to(stored))), None

            shape = tensor.shape[1:]
            return self._once((name, index), lambda _: Weight(f"{name}.{index}", shape, _kind(stored), chunks))

        def slices() -> Iterator[tuple[Tensor, Tensor]]:
            own = tensor.quantized_rows(index, index + 1)[0]
            yield order(own.codes), order(own.scales)

        return self._once(
            (name, index), lambda _: _quantized(f"{name}.{index}", tensor.format, tensor.shape[1:], slices, name)
        )

    def _float(self, name: str, tensor: LazyTensor, dtype: torch.dtype) -> Weight:
        stored = _stored_dtype(tensor, dtype)

        def chunks() -> Iterator[Chunk]:
            for chunk in tensor.chunks(CHUNK_BYTES):
                yield _bytes(chunk.to(stored)), None

        return self._once(name, lambda _: Weight(name, tensor.shape, _kind(stored), chunks))

    def _once(self, key: Any, make: Callable[[Any], Weight]) -> Weight:
        if key not in self._made:
            self._made[key] = make(key)
        return self._made[key]


def _stored_dtype(tensor: LazyTensor, dtype: torch.dtype) -> torch.dtype:
    half = torch.float16 in (tensor.dtype, dtype) and dtype in (torch.float16, torch.float32)
    if half:
        return torch.float16
    if dtype is torch.bool:
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int32


def _kind(dtype: torch.dtype) -> str:
    return {torch.float16: "FLOAT16", torch.float32: "FLOAT32", torch.int32: "INT32", torch.bool: "BOOL"}[dtype]


def _quantized(
    name: str, form: IntegerFormat, shape: tuple[int, ...], slices: Callable[[], Iterator[Any]], of: str
) -> Weight:
    if reason := unsupported_reason(form, shape[-1]):
        raise RefusedError(of, f"format {form}: {reason}", hint=HINT)

    def chunks() -> Iterator[Chunk]:
        for codes, scales in slices():
            data = codes.contiguous().numpy()
            yield (pack_int4(data) if form.bits == 4 else data.view(np.uint8)), scales.float().contiguous().numpy()

    dynamic = form.activations is Activations.INT8_DYNAMIC
    return Weight(name, shape, f"INT{form.bits}", chunks, form.block_length(shape[-1]), dynamic)


def _row_slices(tensor: Quantized) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, CHUNK_BYTES // (4 * tensor.shape[-1]))
    for start in range(0, tensor.shape[0], step):
        own = tensor.quantized_rows(start, min(start + step, tensor.shape[0]))
        yield own.codes, own.scales


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Pack signed codes [..., K] into bytes [..., K / 2], the first of two codes in the low nibble."""
    pairs = codes.reshape(-1, 2).view(np.uint8) & 0xF
    packed: np.ndarray = pairs[:, 0] | (pairs[:, 1] << 4)
    return packed


def _bytes(value: Tensor) -> np.ndarray:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()
