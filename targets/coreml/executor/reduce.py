"""Kernels of reductions, cumulative sums and ordering."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.targets.coreml.executor.kernel import Args, Kernel, axis_of

if TYPE_CHECKING:
    from moec.targets.coreml.executor.dtypes import Array

Reduction = Callable[..., Any]


def _log_sum_exp(x: Array, axis: tuple[int, ...] | None, keepdims: bool) -> Array:
    highest = x.max(axis=axis, keepdims=True)
    # Subtracting an infinite maximum would give NaN; without it, the sum of zeros or infinities is right.
    shift = np.where(np.isfinite(highest), highest, 0).astype(x.dtype)
    total = np.log(np.exp(x - shift).sum(axis=axis, keepdims=True)) + shift
    result: Array = total if keepdims else np.squeeze(total, axis)
    return result


_REDUCTIONS: dict[str, Reduction] = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_l1_norm": lambda x, axis, keepdims: np.abs(x).sum(axis=axis, keepdims=keepdims),
    "reduce_l2_norm": lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis=axis, keepdims=keepdims)),
    "reduce_sum_square": lambda x, axis, keepdims: np.square(x).sum(axis=axis, keepdims=keepdims),
    "reduce_log_sum": lambda x, axis, keepdims: np.log(x.sum(axis=axis, keepdims=keepdims)),
    "reduce_log_sum_exp": _log_sum_exp,
}


def _reduction(function: Reduction) -> Kernel:
    def run(args: Args) -> Array:
        return np.asarray(function(args.array("x"), axis=args.integers("axes"), keepdims=args.flag("keep_dims")))

    return Kernel(run)


def _arg_reduction(function: Callable[..., Any]) -> Kernel:
    def run(args: Args) -> Array:
        return np.asarray(function(args.array("x"), axis=args.integer("axis", -1), keepdims=args.flag("keep_dims")))

    return Kernel(run)


def _cumsum(args: Args) -> Array:
    x, axis = args.array("x"), args.integer("axis", 0)
    if args.flag("reverse"):
        x = np.flip(x, axis)
    total = np.cumsum(x, axis=axis)
    if args.flag("exclusive"):
        # Shifted rather than total - x, which would lose the small terms and turn inf into NaN.
        total = np.roll(total, 1, axis)
        first: list[slice | int] = [slice(None)] * x.ndim
        first[axis] = 0
        total[tuple(first)] = 0
    return np.flip(total, axis) if args.flag("reverse") else total


def _order(x: Array, axis: int, *, ascending: bool) -> Array:
    """Indices that sort `x`; among equal elements, the lower index comes first."""
    if ascending:
        return np.argsort(x, axis=axis, kind="stable")
    backwards = np.argsort(np.flip(x, axis), axis=axis, kind="stable")
    result: Array = x.shape[axis] - 1 - np.flip(backwards, axis)
    return result


def _argsort(args: Args) -> Array:
    return _order(args.array("x"), args.integer("axis", -1), ascending=args.flag("ascending"))


def _topk(args: Args) -> tuple[Array, ...]:
    """The k largest (or smallest) elements, sorted; the lower of tied indices first (undefined in Core ML)."""
    x = args.array("x")
    axis = axis_of(args.integer("axis", -1), x.ndim)
    k = args.integer("k", 1)
    k = x.shape[axis] if k == -1 else k
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"k = {k} exceeds the dimension of size {x.shape[axis]}")
    order = _order(x, axis, ascending=args.flag("ascending"))
    indices = np.take(order, np.arange(k), axis=axis)
    values = np.take_along_axis(x, indices, axis)
    return (values, indices) if args.flag("return_indices", default=True) else (values,)


KERNELS: dict[str, Kernel] = {
    **{name: _reduction(function) for name, function in _REDUCTIONS.items()},
    "reduce_argmax": _arg_reduction(np.argmax),
    "reduce_argmin": _arg_reduction(np.argmin),
    "cumsum": Kernel(_cumsum),
    "argsort": Kernel(_argsort),
    "topk": Kernel(_topk),
}
