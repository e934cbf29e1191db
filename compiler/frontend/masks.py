"""Classify an attention mask by probing the mask function of transformers on index grids.

No single attribute tells whether a layer is causal, sliding or chunked: some families lack the `sliding_window` keyword
and others pass a stale one. The mask function itself, `(batch, head, q, kv) -> bool`, is always right.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moec.compiler.common.errors import UnsupportedModelError

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]


class MaskUseError(AttributeError):
    """A model computes on its mask. It is an AttributeError, so that `hasattr` on a Mask is False."""

    def __init__(self, *_: object) -> None:
        super().__init__("it computes on its attention mask, and moec supports a mask only as an input of attention")


@dataclass(frozen=True, slots=True)
class MaskPattern:
    """Which tokens a layer may attend to: `kind` and `window` of `moec::attention`."""

    kind: str
    window: int = 0


@dataclass(frozen=True, slots=True)
class Mask:
    """Stands for a mask tensor: it holds the mask function, which is classified when a layer attends with it.

    A mask that no layer uses is never classified. Apart from what an indexer needs, using a Mask as a tensor raises
    `MaskUseError`.
    """

    function: MaskFunction
    max_length: int

    def pattern(self) -> MaskPattern:
        """The pattern of the mask function.

        Raises:
            UnsupportedModelError: The mask is not causal, sliding or chunked.
        """
        return classify(self.function, self.max_length)

    @property
    def dtype(self) -> torch.dtype:
        """torch.bool: true means visible."""
        return torch.bool

    def __getattr__(self, name: str) -> Any:
        raise MaskUseError

    def __getitem__(self, index: Any) -> Mask:
        """The mask of the first head, `mask[:, 0]`, which all heads share."""
        if index[:2] != (slice(None), 0) or any(item != slice(None) for item in index[2:]):
            raise MaskUseError
        return self

    def __invert__(self) -> InvertedMask:
        return InvertedMask(self)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        """Called by every function of torch that gets a Mask."""
        raise MaskUseError


@dataclass(frozen=True, slots=True)
class InvertedMask:
    """Stands for the inverse of a mask: the tokens that are not visible."""

    mask: Mask


def classify(mask_function: MaskFunction, max_length: int) -> MaskPattern:
    """Find the pattern of `mask_function`.

    Args:
        mask_function: As transformers passes it to a mask implementation, without padding.
        max_length: Context length of the model in tokens. Positions up to twice as far are probed, so a window larger
            than that counts as causal.

    Raises:
        UnsupportedModelError: The mask is not causal, sliding or chunked.
    """
    with _disable_current_modes():
        function = _without_padding(mask_function)
        last = 2 * max(max_length, 64) + 1
        first = _first(function, last)
        candidates: list[MaskPattern] = []
        if first == 0:
            candidates.append(MaskPattern("causal"))
        elif first <= last:
            candidates = [MaskPattern("sliding", last - first + 1)]
            # The chunk of `last` starts at `first`; the start of the chunk before it gives the size of a chunk.
            candidates.append(MaskPattern("chunked", first - _first(function, first - 1)))
        for pattern in candidates:
            if _draws(function, pattern, last):
                return pattern
    raise UnsupportedModelError(
        "an attention mask is neither causal nor sliding nor chunked",
        hint="moec captures decoders; bidirectional, blockwise and prefix masks are not supported",
    )


def _first(function: MaskFunction, query: int) -> int:
    """The first slot that the token at `query` attends to, or `query + 3` if there is none."""
    seen = _row(function, query).nonzero()
    return int(seen[0]) if len(seen) else query + 3


def _row(function: MaskFunction, query: int) -> Tensor:
    """One row of the mask: which of the slots 0 .. query + 2 the token at `query` attends to, [query + 3] bool."""
    slots = torch.arange(query + 3)
    zero = torch.zeros((), dtype=torch.long)
    result = function(zero, zero, torch.tensor(query), slots)
    return torch.broadcast_to(torch.as_tensor(result), slots.shape)


def _draws(function: MaskFunction, pattern: MaskPattern, last: int) -> bool:
    edges = {0, 1, 2, 3, 7, 31, 64, last // 3, last // 2, last - 1, last}
    if pattern.window:
        edges |= {pattern.window + offset for offset in (-2, -1, 0, 1)}
        edges |= {2 * pattern.window + offset for offset in (-1, 0, 1)}
    for query in sorted(edge for edge in edges if 0 <= edge <= last):
        slots = torch.arange(query + 3)
        want = slots <= query
        if pattern.kind == "sliding":
            want &= slots > query - pattern.window
        elif pattern.kind == "chunked":
            want &= slots // pattern.window == query // pattern.window
        if not torch.equal(_row(function, query), want):
            return False
    return True


def _without_padding(function: Any) -> Any:
    """Rebuild a mask function with zeros for the fake tensors that it closes over.

    During a trace, a chunked mask closes over the number of padding tokens, a fake tensor without a value. Padding is
    an operand of `moec::attention`, so the pattern is that without padding.
    """
    if isinstance(function, Tensor):
        # One sequence is probed; asking a symbolic shape for its size would freeze it.
        return torch.zeros([1] * function.ndim, dtype=function.dtype)
    if isinstance(function, tuple):
        return tuple(_without_padding(item) for item in function)
    if not isinstance(function, types.FunctionType) or not function.__closure__:
        return function
    cells = tuple(types.CellType(_without_padding(cell.cell_contents)) for cell in function.__closure__)
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
