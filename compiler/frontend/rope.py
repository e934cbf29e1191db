"""Rotary tables whose frequencies depend on the length of the sequence, without a branch in Python.

`longrope` (Ding et al., 2024, arXiv:2402.13753) has one set of frequencies up to the original context length and
another beyond it; `dynamic` (NTK-aware scaling) has its own frequencies for each length beyond it. At every step,
transformers branches on `max(position_ids) + 1` over the whole batch (modeling_rope_utils.py). Here the module's own
forward is traced for both branches, and a `where` on the positions chooses, so one graph serves both.

The parity gate feeds the reference the same steps as the artifact, since cached keys keep the frequencies of the step
that made them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from moec.compiler.common.errors import UnsupportedModelError

_MORE = (Tensor.__gt__, Tensor.__ge__, torch.gt, torch.ge, Tensor.gt, Tensor.ge)
_LESS = (Tensor.__lt__, Tensor.__le__, torch.lt, torch.le, Tensor.lt, Tensor.le)
_LONGEST = (torch.max, Tensor.max, torch.amax, Tensor.amax)
_SUMS = (Tensor.__add__, Tensor.add, torch.add, Tensor.__radd__)


def replace_length_branches(model: nn.Module) -> set[int]:
    """Replace the forward of every rotary module whose frequencies depend on the length by one without a branch.

    Returns:
        The lengths in tokens beyond which the frequencies change; empty until the model has run.
    """
    borders: set[int] = set()
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds.values() if isinstance(kinds, Mapping) else (kinds,)
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in named):
            module.forward = _forward(module, type(module).forward, borders)
    return borders


def _forward(module: nn.Module, own: Callable[..., Any], borders: set[int]) -> Callable[..., Any]:
    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        within = _run(_ForcedBranch(long=False), module, own, x, position_ids, *args, **kwargs)
        beyond = _ForcedBranch(long=True)
        past = _run(beyond, module, own, x, position_ids, *args, **kwargs)
        if not beyond.borders:
            return within
        if len(beyond.borders) > 1:
            raise UnsupportedModelError(
                f"{type(module).__name__}: its frequencies change at several lengths: {sorted(beyond.borders)}"
            )
        borders.update(beyond.borders)
        # One number with the rank of the positions, so that it broadcasts.
        longest = position_ids.amax(tuple(range(position_ids.ndim)), keepdim=True)
        is_long = longest + 1 > beyond.borders.pop()
        if isinstance(within, Tensor):
            return _either(is_long, past, within)
        return tuple(_either(is_long, long, short) for long, short in zip(past, within, strict=True))

    return forward


def _either(is_long: Tensor, long: Tensor, short: Tensor) -> Tensor:
    """`torch.where` with a condition of the full shape, since not every runtime broadcasts the condition."""
    return torch.where(is_long.expand(short.shape), long, short)


def _longest(position_ids: Tensor) -> Tensor:
    """The largest position of the batch: []."""
    return position_ids.amax(tuple(range(position_ids.ndim)))


def _run(side: _ForcedBranch, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the forward on a copy of `module`, since it stores the frequencies that it computed last."""
    stand_in = copy.copy(module)
    stand_in._buffers = dict(module._buffers)
    side.buffers = stand_in._buffers
    with side:
        return own(stand_in, *args, **kwargs)


class _ForcedBranch(TorchFunctionMode):
    """Answers every comparison of the length of the sequence as if it were on one side of the border."""

    def __init__(self, *, long: bool) -> None:
        super().__init__()
        self.long = long
        self.borders: set[int] = set()
        self.buffers: dict[str, Tensor | None] = {}
        self._lengths: list[Tensor] = []
        self._answers: list[tuple[Tensor, bool]] = []

    def _answer(self, value: bool) -> Tensor:
        with _disable_current_modes():
            answer = torch.tensor(value)
        self._answers.append((answer, value))
        return answer

    def _is_length(self, value: Any) -> bool:
        return any(value is length for length in self._lengths)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `function`, unless it compares the length or uses the result of such a comparison."""
        first = args[0] if args else None
        handled, result = self._decided(function, first, args)
        if handled:
            return result
        if function in _LONGEST and len(args) == 1 and not kwargs and not args[0].is_floating_point():
            result = _longest(args[0])
        else:
            result = function(*args, **(kwargs or {}))
            if not (function in _SUMS and self._is_length(first)):
                return result
        self._lengths.append(result)
        return result

    def _decided(self, function: Any, first: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
        """Whether `function` is answered here without running it, and the answer."""
        if self._is_length(first):
            if function in _MORE:
                self.borders.add(int(args[1]))
            if function in _MORE or function in _LESS:
                return True, self._answer(self.long == (function in _MORE))
            return function is Tensor.__bool__, True  # a sequence has at least one token
        for answer, value in self._answers:
            if first is answer and function is Tensor.__bool__:
                return True, value
            if first is answer and function is torch.where:
                return True, args[1 if value else 2]
        if function is Tensor.copy_:
            for name, buffer in self.buffers.items():
                if buffer is first:  # the copy keeps the value, not the module
                    self.buffers[name] = args[1]
                    return True, args[1]
        return False, None
