"""Kernels of normalization ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.targets.coreml.executor.kernel import Args, Kernel, axis_of

if TYPE_CHECKING:
    from moec.targets.coreml.executor.dtypes import Array


def _standardize(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    result: Array = centred / np.sqrt(variance + x.dtype.type(epsilon))
    return result


def _affine(x: Array, args: Args, shape: tuple[int, ...]) -> Array:
    gamma, beta = args.optional("gamma"), args.optional("beta")
    if gamma is not None:
        x = x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


def _layer_norm(args: Args) -> Array:
    x = args.array("x")
    axes = tuple(axis_of(axis, x.ndim) for axis in args.integers("axes") or range(x.ndim))
    shape = tuple(size if axis in axes else 1 for axis, size in enumerate(x.shape))
    return _affine(_standardize(x, axes, args.number("epsilon", 1e-5)), args, shape)


def _instance_norm(args: Args) -> Array:
    """Normalise over the spatial dimensions of x [N, C, *D] and scale per channel."""
    x = args.array("x")
    axes = tuple(range(2, x.ndim))
    shape = (1, x.shape[1], *(1 for _ in axes))
    return _affine(_standardize(x, axes, args.number("epsilon", 1e-5)), args, shape)


def _l2_norm(args: Args) -> Array:
    """`x / sqrt(sum(x^2) + epsilon)` over the last three dimensions."""
    x = args.array("x")
    total = np.square(x).sum(axis=(-3, -2, -1), keepdims=True)
    result: Array = x / np.sqrt(total + x.dtype.type(args.number("epsilon", 1e-6)))
    return result


KERNELS: dict[str, Kernel] = {
    "layer_norm": Kernel(_layer_norm),
    "instance_norm": Kernel(_instance_norm),
    "l2_norm": Kernel(_l2_norm),
}
