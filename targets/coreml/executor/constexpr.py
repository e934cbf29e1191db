"""Kernels of `constexpr_*` ops, which decompress weights."""

from __future__ import annotations

import numpy as np

from moec.targets.coreml.executor.dtypes import Array, unpack
from moec.targets.coreml.executor.kernel import Args, Kernel, axis_of


def _blockwise_shift_scale(args: Args) -> Array:
    """Scale * (data - offset), one scale per block; the ratio of the shapes is the block shape."""
    data, scale, offset = args.array("data"), args.array("scale"), args.optional("offset")
    if data.ndim != scale.ndim or any(d % s for d, s in zip(data.shape, scale.shape, strict=True)):
        raise ValueError(f"scales of shape {scale.shape} do not divide data of shape {data.shape}")
    blocks = [size for d, s in zip(data.shape, scale.shape, strict=True) for size in (s, d // s)]
    per_block = [size for s in scale.shape for size in (s, 1)]
    dense = data.reshape(blocks).astype(scale.dtype)
    if offset is not None:
        dense = dense - offset.reshape(per_block).astype(scale.dtype)
    return (dense * scale.reshape(per_block)).reshape(data.shape)


def _affine_dequantize(args: Args) -> Array:
    """Scale * (quantized_data - zero_point), per tensor or along `axis`."""
    data, scale = args.array("quantized_data"), args.array("scale")
    axis = axis_of(args.integer("axis", 0), data.ndim)
    shape = tuple(-1 if d == axis else 1 for d in range(data.ndim))
    zero_point = args.array("zero_point").astype(scale.dtype)
    result: Array = (data.astype(scale.dtype) - zero_point.reshape(shape)) * scale.reshape(shape)
    return result


def _packed_lut(args: Args) -> Array:
    """IOS 16: one table of 2^n values, n-bit indices packed into bytes."""
    lut, shape = args.array("lut"), args.integers("shape") or ()
    bits = (lut.size - 1).bit_length()
    indices = unpack(args.array("indices"), int(np.prod(shape)), bits, signed=False)
    return np.asarray(lut[indices]).reshape(shape)


def _grouped_lut(args: Args) -> Array:
    """IOS 18: lut [groups per dimension of `indices`..., palettes, vector size]."""
    indices, lut = args.array("indices"), args.array("lut")
    rank = indices.ndim
    if lut.ndim != rank + 2 or any(d % g for d, g in zip(indices.shape, lut.shape[:rank], strict=True)):
        raise ValueError(f"table of shape {lut.shape} does not fit indices of shape {indices.shape}")
    groups = np.ix_(*(np.arange(d) // (d // g) for d, g in zip(indices.shape, lut.shape[:rank], strict=True)))
    vectors = lut[(*groups, indices)]
    size = lut.shape[-1]
    if size == 1:
        scalars: Array = vectors[..., 0]
        return scalars
    axis = axis_of(args.integer("vector_axis", rank), rank)
    shape = tuple(d * size if i == axis else d for i, d in enumerate(indices.shape))
    result: Array = np.moveaxis(vectors, -1, axis + 1).reshape(shape)
    return result


def _lut_to_dense(args: Args) -> Array:
    return _grouped_lut(args) if args.optional("shape") is None else _packed_lut(args)


def _sparse_to_dense(args: Args) -> Array:
    """Values where the mask has a set bit, zero elsewhere; iOS 16 packs the mask and gives `shape`."""
    values, mask = args.array("nonzero_data"), args.array("mask")
    shape = args.integers("shape")
    if shape is not None:
        mask = unpack(mask, int(np.prod(shape)), 1, signed=False).reshape(shape)
    dense = np.zeros(mask.shape, values.dtype)
    dense[mask != 0] = values
    return dense


def _cast(args: Args) -> Array:
    if args.text("output_dtype", "") != "fp32":
        raise ValueError("constexpr_cast converts to fp32 only")
    return args.array("source_val").astype(np.float32)


KERNELS: dict[str, Kernel] = {
    "constexpr_blockwise_shift_scale": Kernel(_blockwise_shift_scale),
    "constexpr_affine_dequantize": Kernel(_affine_dequantize),
    "constexpr_lut_to_dense": Kernel(_lut_to_dense, widen=False),
    "constexpr_sparse_to_dense": Kernel(_sparse_to_dense, widen=False),
    "constexpr_cast": Kernel(_cast, widen=False),
}
