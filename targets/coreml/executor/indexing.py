"""Kernels of slices, gathers and scatters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moec.targets.coreml.executor.kernel import Args, Kernel, axis_of, checked_indices

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.targets.coreml.executor.dtypes import Array

_SCATTER_MODES: dict[str, Callable[..., None]] = {
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "div": np.divide.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


def _slices(args: Args, rank: int) -> tuple[slice | int, ...]:
    begin, end = args.integers("begin") or (), args.integers("end") or ()
    if len(begin) != rank or len(end) != rank:
        raise ValueError(f"begin {begin} and end {end} do not fit rank {rank}")
    nothing = (0,) * rank
    stride = args.integers("stride") or (1,) * rank
    begin_mask = args.integers("begin_mask") or nothing
    end_mask = args.integers("end_mask") or nothing
    squeeze = args.integers("squeeze_mask") or nothing
    return tuple(
        begin[d]
        if squeeze[d]
        else slice(None if begin_mask[d] else begin[d], None if end_mask[d] else end[d], stride[d])
        for d in range(rank)
    )


def _slice_by_index(args: Args) -> Array:
    x = args.array("x")
    return np.asarray(x[_slices(args, x.ndim)])


def _slice_by_size(args: Args) -> Array:
    """`size` elements from `begin` on; a size of -1 takes the rest."""
    x = args.array("x")
    parts = []
    for start, size, limit in zip(args.integers("begin") or (), args.integers("size") or (), x.shape, strict=True):
        first = start + limit if start < 0 else start
        last = limit if size == -1 else first + size
        if not 0 <= first <= last <= limit:
            raise ValueError(f"elements {first} to {last} exceed the dimension of size {limit}")
        parts.append(slice(first, last))
    return x[tuple(parts)]


def _slice_update(args: Args) -> Array:
    x = args.array("x").copy()
    window = _slices(args, x.ndim)
    x[window] = args.array("update").reshape(x[window].shape)
    return x


def _gather(args: Args) -> Array:
    x, batch = args.array("x"), args.integer("batch_dims", 0)
    axis = axis_of(args.integer("axis", 0), x.ndim)
    indices = checked_indices(args, args.array("indices"), x.shape[axis])
    if batch == 0:
        return np.asarray(np.take(x, indices, axis=axis))
    if not batch <= axis:
        raise ValueError(f"axis {axis} lies within the {batch} batch dimensions")
    rows = x.reshape(-1, *x.shape[batch:])
    picks = indices.reshape(-1, *indices.shape[batch:])
    taken = [np.take(row, pick, axis=axis - batch) for row, pick in zip(rows, picks, strict=True)]
    return np.stack(taken).reshape(*x.shape[:batch], *taken[0].shape)


def _gather_along_axis(args: Args) -> Array:
    x = args.array("x")
    axis = axis_of(args.integer("axis", 0), x.ndim)
    return np.take_along_axis(x, checked_indices(args, args.array("indices"), x.shape[axis]), axis)


def _coordinates(args: Args, indices: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
    """The last dimension of `indices` as one index array per leading dimension of `shape`."""
    columns = np.moveaxis(indices, -1, 0)
    return tuple(checked_indices(args, column, size) for column, size in zip(columns, shape, strict=False))


def _gather_nd(args: Args) -> Array:
    x, indices, batch = args.array("x"), args.array("indices"), args.integer("batch_dims", 0)
    picks = _coordinates(args, indices, x.shape[batch:])
    extra = indices.ndim - 1 - batch
    grid = np.ix_(*(np.arange(size) for size in x.shape[:batch]))
    lead = tuple(part.reshape(*part.shape, *(1 for _ in range(extra))) for part in grid)
    return np.asarray(x[lead + picks])


def _scattered(args: Args, window: tuple[Any, ...]) -> Array:
    """`data` with `updates` combined into `window` by `mode`; repeated indices are applied in order."""
    data = args.array("data").copy()
    mode = args.text("mode", "add")
    if mode == "update":
        data[window] = args.array("updates")
    elif mode == "div" and data.dtype.kind != "f":
        raise ValueError("scatter cannot divide integers")
    elif mode in _SCATTER_MODES:
        _SCATTER_MODES[mode](data, window, args.array("updates"))
    else:
        raise ValueError(f"unknown scatter mode {mode!r}")
    return data


def _scatter(args: Args) -> Array:
    data = args.array("data")
    axis = axis_of(args.integer("axis", 0), data.ndim)
    indices = checked_indices(args, args.array("indices"), data.shape[axis])
    return _scattered(args, (*(slice(None) for _ in range(axis)), indices))


def _scatter_along_axis(args: Args) -> Array:
    data = args.array("data")
    axis = axis_of(args.integer("axis", 0), data.ndim)
    indices = checked_indices(args, args.array("indices"), data.shape[axis])
    window: list[Array] = list(np.ix_(*(np.arange(size) for size in indices.shape)))
    window[axis] = indices
    return _scattered(args, tuple(window))


def _scatter_nd(args: Args) -> Array:
    return _scattered(args, _coordinates(args, args.array("indices"), args.array("data").shape))


KERNELS: dict[str, Kernel] = {
    "slice_by_index": Kernel(_slice_by_index, widen=False, partial="x"),
    "slice_by_size": Kernel(_slice_by_size, widen=False, partial="x"),
    "slice_update": Kernel(_slice_update, widen=False),
    "gather": Kernel(_gather, widen=False, partial="x"),
    "gather_along_axis": Kernel(_gather_along_axis, widen=False, partial="x"),
    "gather_nd": Kernel(_gather_nd, widen=False, partial="x"),
    "scatter": Kernel(_scatter),
    "scatter_along_axis": Kernel(_scatter_along_axis),
    "scatter_nd": Kernel(_scatter_nd),
}
