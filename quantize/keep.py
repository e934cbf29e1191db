"""Codes of a checkpoint that is stored quantized, kept: on the same grid bit for bit where a target holds that grid.

Codes, scales and zero points take the way of their weights through stacking, joining and transposing
(`LazyTensor.over`). What comes out is a grid again if the last axis still falls into blocks of one scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError
from moec.compiler.ir.encoded_weights import Encoded, Made, Spread
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.formats import BLOCK_SIZES, Activations, IntegerFormat, ScaleType, parse_format
from moec.quantize.lazy import Quantized
from moec.quantize.methods.tensors import QuantizedTensor


@dataclass(frozen=True)
class Held:
    """What a target holds, by tensor class, as text forms without words for scales.

    Attributes:
        codes: Formats whose codes it takes as they are.
        formats: Formats that it takes with codes that were made for it.
    """

    codes: Callable[[str], Sequence[str]] = lambda _: ()
    formats: Callable[[str], Sequence[str]] = lambda _: ()

    def kept(self, tensor_class: str, fmt: IntegerFormat) -> IntegerFormat | None:
        """`fmt`, with the activations that the target wants, if it takes codes on that grid as they are."""
        for offered in _parsed(self.codes(tensor_class)):
            if offered.grid == fmt.grid:
                wanted = fmt if offered.activations is Activations.FLOAT else offered
                return replace(fmt, activations=wanted.activations)
        return None

    def nearest(self, tensor_class: str, grid: Grid, columns: int) -> IntegerFormat | None:
        """What to round to where a grid cannot be kept: as many bits, or else 8, in the smallest blocks that divide.

        None where the target holds none of them.
        """
        offered = [fmt for fmt in _parsed(self.formats(tensor_class)) if fmt.symmetric]
        if not any(fmt.granularity == "channel" for fmt in offered):
            offered += [fmt for fmt in _parsed(self.codes(tensor_class)) if fmt.symmetric]
        fitting = [fmt for fmt in offered if fmt.granularity == "channel" or columns % int(fmt.granularity) == 0]
        wide = [fmt for fmt in fitting if fmt.bits == 8]
        alike = [fmt for fmt in fitting if fmt.bits == (4 if grid.bits <= 4 else 8)]
        return min(alike or wide, key=lambda fmt: fmt.block_length(columns), default=None)


def _parsed(texts: Sequence[str]) -> list[IntegerFormat]:
    return [fmt for text in texts if isinstance(fmt := parse_format(text), IntegerFormat)]


@dataclass(frozen=True)
class Kept(Quantized):
    """A weight whose codes are those of the checkpoint. `source` is its float form.

    Attributes:
        codes: The codes, int8, of the shape of the weight.
        scales: The scale of each element.
        zeros: The zero point of each element; None where all are 0.
    """

    codes: LazyTensor | None = None
    scales: LazyTensor | None = None
    zeros: LazyTensor | None = None

    def errors(self) -> list[float]:
        """None: the artifact holds the very weights of the checkpoint."""
        return [0.0]

    def _quantize(self, start: int, stop: int) -> QuantizedTensor:
        assert self.codes is not None
        assert self.scales is not None
        scales = _by_block(self.scales.rows(start, stop), self.block, self.name).to(self.format.scale_type.dtype)
        points = None
        if self.zeros is not None:
            points = _by_block(self.zeros.rows(start, stop), self.block, self.name).to(torch.int8)
        return QuantizedTensor(self.format, self.codes.rows(start, stop), scales, points)


@dataclass(frozen=True)
class Grid:
    """What the codes of a weight are, after all that moved it.

    Attributes:
        kinds: Forms that its parts are stored in.
        bits: Bits of a code in the file.
        format: The integer format that holds them bit for bit; None where none does.
        reason: Why none does.
    """

    kinds: tuple[str, ...]
    bits: int
    format: IntegerFormat | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{' and '.join(self.kinds)} of {self.bits} bits"


def grid_of(tensor: LazyTensor) -> Grid | None:
    """The grid of a weight; None if it is not stored as codes."""
    leaves = _leaves(tensor)
    encoded = [leaf for leaf in leaves if isinstance(leaf, Encoded)]
    if not encoded:
        return None
    kinds, bits = tuple(sorted({leaf.kind for leaf in encoded})), max(leaf.bits for leaf in encoded)

    def none(reason: str) -> Grid:
        return Grid(kinds, bits, None, reason)

    if len(encoded) < len(leaves):
        return none("only some of what it is made of is stored as codes")
    if not all(leaf.whole for leaf in encoded) or len({leaf.bits for leaf in encoded}) > 1:
        return none("its codes are no whole numbers of one width")
    if bits not in {4, 8}:
        return none(f"no target has codes of {bits} bits")
    blocks = _view(tensor, _blocks)
    if blocks is None:
        return none("it is computed from its codes, not only moved")
    length = _common_run(blocks)
    columns = tensor.shape[-1]
    if length != columns and length not in BLOCK_SIZES:
        return none(f"a scale holds for runs of {length} of its {columns} columns")
    symmetric = _symmetric(tensor)
    if not symmetric and bits == 8:
        return none("it has zero points, and int8 is symmetric")
    if not symmetric and not _fit(tensor, -(1 << (bits - 1)), (1 << (bits - 1)) - 1):
        return none("a zero point lies outside of the range of its codes")
    half = all(_exact_in_half(leaf.scales) for leaf in encoded)
    granularity: Any = "channel" if length == columns else length
    scale_type = ScaleType.FP16 if half else ScaleType.FP32
    return Grid(kinds, bits, IntegerFormat(4 if bits == 4 else 8, granularity, symmetric, scale_type))


def kept(name: str, tensor: LazyTensor, fmt: IntegerFormat) -> Kept:
    """`tensor`, whose grid is `fmt`, with its codes as they are stored."""
    codes, scales = _view(tensor, lambda leaf: leaf.codes), _view(tensor, lambda leaf: leaf.scales)
    zeros = None if fmt.symmetric else _view(tensor, _zeros)
    return Kept(name, tensor, fmt, codes=codes, scales=scales, zeros=zeros)


def _view(tensor: LazyTensor, part: Callable[[Encoded], LazyTensor]) -> LazyTensor | None:
    return tensor.over(lambda leaf: part(leaf) if isinstance(leaf, Encoded) else None)


def _leaves(tensor: LazyTensor) -> list[LazyTensor]:
    """What a weight is made of; the weight itself where it is computed."""
    found: list[LazyTensor] = []

    def note(leaf: LazyTensor) -> LazyTensor:
        found.append(leaf)
        return leaf

    return found if tensor.over(note) is not None else [tensor]


def _zeros(leaf: Encoded) -> LazyTensor:
    if leaf.zeros is not None:
        return leaf.zeros
    return Made(
        leaf.shape, torch.int8, lambda start, stop: torch.zeros(stop - start, *leaf.shape[1:], dtype=torch.int8)
    )


def _blocks(leaf: Encoded) -> LazyTensor:
    """A number for each element: that of its block of columns in its row, another one for each block and row."""
    columns = leaf.shape[-1]
    index = torch.arange(columns) // leaf.scales.block[1]
    if leaf.scales.index is not None:
        index = leaf.scales.index.read().to(torch.int64)
    count = int(index.max()) + 1

    def numbers(start: int, stop: int) -> Tensor:
        rows = torch.arange(leaf.shape[-2]) if len(leaf.shape) > 2 else torch.arange(start, stop)
        value = rows[:, None] * count + index
        return value.expand(stop - start, *leaf.shape[1:]) if len(leaf.shape) > 2 else value

    return Made(leaf.shape, torch.int64, numbers)


def _common_run(blocks: LazyTensor) -> int:
    """Largest length into which every run of equal numbers along the last axis of a row divides."""
    value = blocks.rows(0, 1)
    flat = value.reshape(-1, value.shape[-1])
    length = flat.shape[-1]
    changed = (flat[:, 1:] != flat[:, :-1]).any(0).nonzero().flatten() + 1
    return math.gcd(length, *changed.tolist())


def _exact_in_half(scales: Spread) -> bool:
    if scales.dtype == torch.float16:
        return True
    parts = (part.to(torch.float32) for part in scales.source.chunks())
    return all(bool((part.to(torch.float16).to(torch.float32) == part).all()) for part in parts)


def _symmetric(tensor: LazyTensor) -> bool:
    return _fit(tensor, 0, 0)


def _fit(tensor: LazyTensor, low: int, high: int) -> bool:
    """Whether every zero point lies in [low, high]."""
    return all(
        bool(((part >= low) & (part <= high)).all())
        for leaf in _leaves(tensor)
        if isinstance(leaf, Encoded) and leaf.zeros is not None
        for part in leaf.zeros.source.chunks()
    )


def _by_block(values: Tensor, block: int, name: str) -> Tensor:
    """One of each block along the last axis, where all of a block are equal.

    Raises:
        CheckpointError: They are not.
    """
    groups = values.unflatten(-1, (-1, block))  # type: ignore[no-untyped-call]
    if not bool((groups == groups[..., :1]).all()):
        raise CheckpointError(
            f"{name}: its parts are quantized in different groups of columns",
            hint="export it without --quantize keep",
        )
    first: Tensor = groups[..., 0]
    return first
