"""Reductions, argmax, norms, softmax, cumulative sums, top-k and sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moec.passes.decompose.builder import Builder, Rule, Rules
from moec.passes.rewriting import aten


def _axes(b: Builder, value: fx.Node, dim: Any) -> list[int]:
    """The axes in `dim` as non-negative indices; None and an empty list mean all axes."""
    rank = value.meta["val"].ndim
    named = [dim] if isinstance(dim, int) else dim
    return [b.axis(value, axis) for axis in named] if named else list(range(rank))


def _reduce(op: Any) -> Rule:
    """A reduction over given axes, or over all; it computes in the dtype of its result."""

    def rule(b: Builder, self: fx.Node, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> fx.Node | None:  # noqa: ARG001
        value, axes = b.cast(self, b.dtype), _axes(b, self, dim)
        if b.node.target is op and value is self and b.node.args[1:] == (axes, keepdim) and not b.node.kwargs:
            return None
        return b(op, value, axes, keepdim) if axes else value

    return rule


def _whole(op: Any) -> Rule:
    def rule(b: Builder, self: fx.Node, dtype: Any = None) -> fx.Node:  # noqa: ARG001
        value, axes = b.cast(self, b.dtype), _axes(b, self, None)
        return b(op, value, axes, False) if axes else value

    return rule


def _bools(op: Any) -> Rule:
    """`any` as a maximum or `all` as a minimum of 0 and 1."""

    def rule(b: Builder, self: fx.Node, dim: Any = None, keepdim: bool = False) -> fx.Node:
        zero = b.full([], 0, self.meta["val"].dtype)
        holds = self
        if self.meta["val"].dtype != torch.bool:
            holds = b(aten.logical_not.default, b(aten.eq.Tensor, self, zero))
        else:
            b.graph.erase_node(zero)
        axes = _axes(b, self, dim)
        return b.cast(b(op, b.cast(holds, torch.int32), axes, keepdim), torch.bool) if axes else holds

    return rule


def _best(sign: int) -> Rule:
    """Index of the largest (1) or smallest (-1) element."""

    def rule(b: Builder, self: fx.Node, dim: Any = None, keepdim: bool = False) -> fx.Node | None:
        value = self if sign > 0 else b(aten.neg.default, self)
        if dim is not None:
            axis = b.axis(self, dim)
            done = value is self and b.node.args[1:] == (axis, keepdim)
            return None if done else b(aten.argmax.default, value, axis, keepdim)
        found = b(aten.argmax.default, b(aten.reshape.default, value, [-1]), 0, False)
        return b(aten.reshape.default, found, [1] * self.meta["val"].ndim) if keepdim else found

    return rule


def _best_along(op: Any, sign: int) -> Rule:
    def rule(b: Builder, self: fx.Node, dim: int, keepdim: bool = False) -> Sequence[fx.Node]:
        axis = b.axis(self, dim)
        ranked = self if sign > 0 else b(aten.neg.default, self)
        return b(op, self, [axis], keepdim), b(aten.argmax.default, ranked, axis, keepdim)

    return rule


def _norm(b: Builder, self: fx.Node, order: Any, dim: Any, keepdim: bool) -> fx.Node | None:
    """The vector norm of order 2, 1 or infinity over axes."""
    value, axes = b.cast(self, b.dtype), _axes(b, self, dim)
    if order == 2:
        return b(aten.sqrt.default, b(aten.sum.dim_IntList, b(aten.mul.Tensor, value, value), axes, keepdim))
    if order == 1:
        return b(aten.sum.dim_IntList, b(aten.abs.default, value), axes, keepdim)
    if order == math.inf:
        return b(aten.amax.default, b(aten.abs.default, value), axes, keepdim)
    return None


def _vector_norm(
    b: Builder,
    self: fx.Node,
    ord: Any = 2,  # noqa: A002
    dim: Any = None,
    keepdim: bool = False,
    dtype: Any = None,  # noqa: ARG001
) -> fx.Node | None:
    return _norm(b, self, ord, dim, keepdim)


def _norm_of_axes(b: Builder, self: fx.Node, p: Any, dim: Any, keepdim: bool = False) -> fx.Node | None:
    return _norm(b, self, 2 if p is None else p, dim, keepdim)


def _variance(
    b: Builder, self: fx.Node, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> fx.Node | None:
    """Variance: the mean squared deviation from the mean, times n / (n - correction)."""
    axes = _axes(b, self, dim)
    count = math.prod(self.meta["val"].shape[axis] for axis in axes)
    lost = 1 if correction is None else correction
    if not isinstance(count, int):
        return None
    distance = b(aten.sub.Tensor, self, b(aten.mean.dim, self, axes, True))
    mean = b(aten.mean.dim, b(aten.mul.Tensor, distance, distance), axes, keepdim)
    return mean if lost == 0 else b(aten.mul.Tensor, mean, count / max(count - lost, 0.0) if count > lost else math.inf)


def _softmax(b: Builder, self: fx.Node, dim: int, *_: Any) -> fx.Node | None:
    """Drop the third argument (float32 result for a half input), which the dtype of the result implies."""
    value, axis = b.cast(self, b.dtype), b.axis(self, dim)
    if b.node.target is aten._softmax.default and value is self and b.node.args[1:] == (axis, False):
        return None
    return b(aten._softmax.default, value, axis, False)


def _log_softmax(b: Builder, self: fx.Node, dim: int, *_: Any) -> fx.Node:
    value, axis = b.cast(self, b.dtype), b.axis(self, dim)
    shifted = b(aten.sub.Tensor, value, b(aten.amax.default, value, [axis], True))
    total = b(aten.sum.dim_IntList, b(aten.exp.default, shifted), [axis], True)
    return b(aten.sub.Tensor, shifted, b(aten.log.default, total))


def _log_sum_exp(b: Builder, self: fx.Node, dim: Any, keepdim: bool = False) -> fx.Node:
    axes = _axes(b, self, dim)
    largest = b(aten.amax.default, self, axes, True)
    total = b(aten.sum.dim_IntList, b(aten.exp.default, b(aten.sub.Tensor, self, largest)), axes, True)
    found = b(aten.add.Tensor, b(aten.log.default, total), largest)
    return found if keepdim else b(aten.squeeze.dims, found, axes)


def _cumsum(b: Builder, self: fx.Node, dim: int, dtype: Any = None) -> fx.Node | None:  # noqa: ARG001
    value, axis = b.cast(self, b.dtype), b.axis(self, dim)
    done = value is self and b.node.args[1:] == (axis,) and not b.node.kwargs
    return None if done else b(aten.cumsum.default, value, axis)


def _topk(b: Builder, self: fx.Node, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:  # noqa: A002, ARG001
    """Always return sorted results, which are valid for `sorted=False` too."""
    axis = b.axis(self, dim)
    done = b.node.args[1:] == (k, axis, largest, True)
    return None if done else b(aten.topk.default, self, k, axis, largest, True)


def _sort(b: Builder, self: fx.Node, dim: int = -1, descending: bool = False) -> fx.Node:
    axis = b.axis(self, dim)
    return b(aten.topk.default, self, b.sizes(self)[axis], axis, descending, True)


def _sort_stable(b: Builder, self: fx.Node, stable: Any, dim: int = -1, descending: bool = False) -> fx.Node | None:
    # A top-k does not define the order of equal elements, so it cannot replace a stable sort.
    return None if stable else _sort(b, self, dim, descending)


def _argsort(b: Builder, self: fx.Node, dim: int = -1, descending: bool = False) -> fx.Node:
    return b.results(_sort(b, self, dim, descending))[1]


RULES: Rules = {
    aten.sum.dim_IntList: _reduce(aten.sum.dim_IntList),
    aten.sum.default: _whole(aten.sum.dim_IntList),
    aten.mean.dim: _reduce(aten.mean.dim),
    aten.mean.default: _whole(aten.mean.dim),
    aten.amax.default: _reduce(aten.amax.default),
    aten.amin.default: _reduce(aten.amin.default),
    aten.max.default: _whole(aten.amax.default),
    aten.min.default: _whole(aten.amin.default),
    aten.any.default: _bools(aten.amax.default),
    aten.any.dim: _bools(aten.amax.default),
    aten.any.dims: _bools(aten.amax.default),
    aten.all.default: _bools(aten.amin.default),
    aten.all.dim: _bools(aten.amin.default),
    aten.all.dims: _bools(aten.amin.default),
    aten.argmax.default: _best(1),
    aten.argmin.default: _best(-1),
    aten.max.dim: _best_along(aten.amax.default, 1),
    aten.min.dim: _best_along(aten.amin.default, -1),
    aten.linalg_vector_norm.default: _vector_norm,
    aten.norm.ScalarOpt_dim: _norm_of_axes,
    aten.var.correction: _variance,
    aten._softmax.default: _softmax,
    aten.softmax.int: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten.log_softmax.int: _log_softmax,
    aten.logsumexp.default: _log_sum_exp,
    aten.cumsum.default: _cumsum,
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.sort.stable: _sort_stable,
    aten.argsort.default: _argsort,
}
