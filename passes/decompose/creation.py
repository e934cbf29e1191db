"""Ops that create tensors from numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from moec.passes.decompose.builder import Builder, Rule, Rules, is_tensor
from moec.passes.rewriting import aten


def _filled(value: int) -> Rule:
    """A tensor of given sizes, filled with `value`."""
    return lambda b, size, **_: b.full(size, value, b.dtype)


def _filled_beside(value: int) -> Rule:
    """A tensor of given sizes, filled with `value`, by a method of another tensor (`new_zeros`)."""
    return lambda b, _self, size, **_: b.full(size, value, b.dtype)


def _filled_like(value: int) -> Rule:
    """A tensor of the sizes of another one, filled with `value` (`zeros_like`)."""
    return lambda b, self, **_: b.full(b.sizes(self), value, b.dtype)


def _full(b: Builder, size: Sequence[Any], fill_value: Any, dtype: Any = None) -> fx.Node | None:
    done = b.node.target is aten.full.default and dtype == b.dtype and not is_tensor(fill_value)
    return None if done else b.full(size, fill_value, b.dtype)


def _full_beside(b: Builder, _self: fx.Node, size: Sequence[Any], fill_value: Any, **_: Any) -> fx.Node:
    return b.full(size, fill_value, b.dtype)


def _full_like(b: Builder, self: fx.Node, fill_value: Any, **_: Any) -> fx.Node:
    return b.full(b.sizes(self), fill_value, b.dtype)


def _scalar(b: Builder, s: Any, **_: Any) -> fx.Node:
    return b.full([], s, b.dtype)


def _range(b: Builder, start: Any, end: Any, step: Any = 1, dtype: Any = None) -> fx.Node | None:
    done = b.node.target is aten.arange.start_step and dtype == b.dtype
    return None if done else b(aten.arange.start_step, start, end, step, dtype=b.dtype)


def _range_to(b: Builder, end: Any, dtype: Any = None) -> fx.Node:  # noqa: ARG001
    return b(aten.arange.start_step, 0, end, 1, dtype=b.dtype)


RULES: Rules = {
    aten.zeros.default: _filled(0),
    aten.ones.default: _filled(1),
    aten.empty.memory_format: _filled(0),
    aten.new_zeros.default: _filled_beside(0),
    aten.new_ones.default: _filled_beside(1),
    aten.new_empty.default: _filled_beside(0),
    aten.zeros_like.default: _filled_like(0),
    aten.ones_like.default: _filled_like(1),
    aten.empty_like.default: _filled_like(0),
    aten.full.default: _full,
    aten.new_full.default: _full_beside,
    aten.full_like.default: _full_like,
    aten.scalar_tensor.default: _scalar,
    aten.arange.default: _range_to,
    aten.arange.start: _range,
    aten.arange.start_step: _range,
}
