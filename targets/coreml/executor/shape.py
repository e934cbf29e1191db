"""Kernels of ops that rearrange, concatenate, split or generate tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moec.targets.coreml.executor.kernel import Args, Kernel, Result, axis_of

if TYPE_CHECKING:
    from moec.targets.coreml.executor.dtypes import Array


def _reshape(args: Args) -> Array:
    """Reshape; in the target shape, 0 keeps a dimension and -1 is inferred."""
    x, shape = args.array("x"), args.integers("shape") or ()
    if 0 in shape:
        if len(shape) != x.ndim:
            raise ValueError(f"0 in shape {shape} needs as many dimensions as {x.shape}")
        shape = tuple(size or kept for size, kept in zip(shape, x.shape, strict=True))
    return x.reshape(shape)


def _expand_dims(args: Args) -> Array:
    return np.expand_dims(args.array("x"), args.integers("axes") or ())


def _squeeze(args: Args) -> Array:
    return np.squeeze(args.array("x"), args.integers("axes"))


def _transpose(args: Args) -> Array:
    return np.transpose(args.array("x"), args.integers("perm"))


def _tile(args: Args) -> Array:
    return np.tile(args.array("x"), args.integers("reps") or ())


def _shape(args: Args) -> Array:
    return np.array(args.array("x").shape, dtype=np.int32)


def _concat(args: Args) -> Array:
    values = args.arrays("values")
    axis = args.integer("axis", 0)
    if values[0].ndim == 0:
        return np.stack(values, axis)
    if not args.flag("interleave"):
        return np.concatenate(values, axis)
    axis = axis_of(axis, values[0].ndim)
    stacked = np.stack(values, axis + 1)
    return stacked.reshape(*values[0].shape[:axis], -1, *values[0].shape[axis + 1 :])


def _split(args: Args) -> tuple[Array, ...]:
    x = args.array("x")
    axis = axis_of(args.integer("axis", 0), x.ndim)
    sizes = args.integers("split_sizes")
    if sizes is None:
        return tuple(np.split(x, args.integer("num_splits", 1), axis))
    if sum(sizes) != x.shape[axis]:
        raise ValueError(f"split sizes {sizes} do not add up to {x.shape[axis]}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


def _stack(args: Args) -> Array:
    return np.stack(args.arrays("values"), args.integer("axis", 0))


def _reverse(args: Args) -> Array:
    return np.flip(args.array("x"), args.integers("axes"))


def _pad(args: Args) -> Array:
    x, pad = args.array("x"), args.integers("pad") or ()
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + list(zip(pad[::2], pad[1::2], strict=True))
    mode = args.text("mode", "constant")
    if mode == "constant":
        return np.pad(x, widths, constant_values=x.dtype.type(args.number("constant_val", 0.0)))
    if mode == "reflect":
        return np.pad(x, widths, "reflect")
    if mode == "replicate":
        return np.pad(x, widths, "edge")
    raise ValueError(f"unknown pad mode {mode!r}")


def _fill(args: Args) -> Array:
    value = args.optional("value")
    return np.full(args.integers("shape") or (), 0.0 if value is None else value.reshape(()))


def _fill_like(args: Args) -> Array:
    value = args.optional("value")
    return np.full(args.array("ref_tensor").shape, 0.0 if value is None else value.reshape(()))


def _range_1d(args: Args) -> Array:
    return np.arange(*(args.array(name).reshape(()).item() for name in ("start", "end", "step")))


def _one_hot(args: Args) -> Array:
    """An index out of range yields a row of `off_value`."""
    indices = args.array("indices")
    axis = axis_of(args.integer("axis", -1), indices.ndim + 1)
    classes = np.arange(args.integer("one_hot_vector_size", 0))
    hot = np.moveaxis(indices[..., None] == classes, -1, axis)
    on, off = args.optional("on_value"), args.optional("off_value")
    return np.where(hot, 1 if on is None else on.reshape(()), 0 if off is None else off.reshape(()))


def _band_part(args: Args) -> Array:
    """Keep `lower` diagonals below and `upper` above the main one, zero the others; negative keeps all."""
    x = args.array("x")
    below = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])[None, :]
    lower, upper = args.integer("lower", -1), args.integer("upper", -1)
    inside = ((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper))
    return np.where(inside, x, np.zeros((), x.dtype))


_MOVING: dict[str, Callable[[Args], Result]] = {
    "reshape": _reshape,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "tile": _tile,
    "shape": _shape,
    "concat": _concat,
    "split": _split,
    "stack": _stack,
    "reverse": _reverse,
    "pad": _pad,
    "fill": _fill,
    "fill_like": _fill_like,
    "one_hot": _one_hot,
    "band_part": _band_part,
}
"""Ops that only move data, and so need no widening of half precision."""

KERNELS: dict[str, Kernel] = {
    **{name: Kernel(function, widen=False) for name, function in _MOVING.items()},
    "range_1d": Kernel(_range_1d),
}
