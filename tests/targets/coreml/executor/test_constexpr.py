"""Compressed weights: stored bytes, dequantized values, the cache, and what counts as read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.executor.constants import ConstantCache
from moec.targets.coreml.library import coremltools_module

RNG = np.random.default_rng(4)
EXPERTS, INNER, OUTER, BLOCK = 4, 64, 48, 32


def quantized(dtype: Any, low: int, high: int) -> tuple[Any, Any]:
    data = RNG.integers(low, high + 1, (EXPERTS, INNER, OUTER)).astype(dtype)
    scale = RNG.random((EXPERTS, INNER // BLOCK, OUTER)).astype(np.float16) + np.float16(0.1)
    return data, scale


def dequantized(data: Any, scale: Any, offset: Any = 0) -> Any:
    wide = [np.repeat(np.asarray(part, np.float32), BLOCK, axis=1) for part in (scale, offset + 0 * scale)]
    return ((data.astype(np.float32) - wide[1]) * wide[0]).astype(np.float16)


def gathered(builder: Any, weight: Any, name: str = "pick") -> Any:
    """A program that yields the experts named by its input."""
    mb = builder.mb
    return builder.save(
        {"i": builder.placeholder((2,), np.int32)},
        lambda i: mb.gather(x=weight(mb), indices=i, axis=0, validate_indices=False, name=name),
    )


@pytest.mark.parametrize(
    ("kind", "low", "high", "bits"),
    [("int8", -128, 127, 8), ("int4", -8, 7, 4), ("uint8", 0, 255, 8), ("uint4", 0, 15, 4)],
)
def test_blockwise_weights(builder: Any, kind: str, low: int, high: int, bits: int) -> None:
    types = coremltools_module("coremltools.converters.mil.mil").types
    data, scale = quantized(types.nptype_from_builtin(types.string_to_builtin(kind)), low, high)
    path = gathered(builder, lambda mb: mb.constexpr_blockwise_shift_scale(data=data, scale=scale))
    session = MilModel.open(path).session()
    result = session.predict({"i": [3, 1]})["pick"]
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, dequantized(data, scale)[[3, 1]])
    stored = data.size * bits // 8 + scale.nbytes
    assert session.counters.total().weight_bytes == stored * 2 // EXPERTS


def test_blockwise_offsets(builder: Any) -> None:
    types = coremltools_module("coremltools.converters.mil.mil").types
    data, scale = quantized(types.np_uint4_dtype, 0, 15)
    offset = RNG.integers(0, 16, scale.shape).astype(types.np_uint4_dtype)
    path = gathered(builder, lambda mb: mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset))
    result = MilModel.open(path).session().predict({"i": [0, 2]})["pick"]
    np.testing.assert_array_equal(result, dequantized(data, scale, offset.astype(np.float16))[[0, 2]])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_palettized_weights(builder: Any, bits: int, groups: int) -> None:
    types = coremltools_module("coremltools.converters.mil.mil").types
    unsigned = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
    indices = RNG.integers(0, 2**bits, (EXPERTS, 6, 5)).astype(unsigned)
    lut = RNG.standard_normal((EXPERTS, groups, 1, 2**bits, 1)).astype(np.float16)
    path = gathered(builder, lambda mb: mb.constexpr_lut_to_dense(indices=indices, lut=lut))
    model = MilModel.open(path)
    result = model.session().predict({"i": [1, 3]})["pick"]
    for row, expert in enumerate((1, 3)):
        for channel in range(6):
            table = lut[expert, channel * groups // 6, 0, :, 0]
            np.testing.assert_array_equal(result[row, channel], table[indices[expert, channel].astype(int)])
    weight = next(item for item in model.constants().values() if item.type.shape == indices.shape)
    # coremltools inlines a table of fewer than 10 values in the program; it writes larger ones to the file.
    table_bytes = lut.nbytes if lut.size >= 10 else 0
    assert weight.stored_bytes == (indices.size * bits + 7) // 8 + table_bytes


def test_vector_palettes(builder: Any) -> None:
    types = coremltools_module("coremltools.converters.mil.mil").types
    indices = RNG.integers(0, 4, (4, 6)).astype(types.np_uint2_dtype)
    lut = RNG.standard_normal((2, 1, 4, 3)).astype(np.float16)
    path = gathered(builder, lambda mb: mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=np.int32(1)))
    result = MilModel.open(path).session().predict({"i": [0, 3]})["pick"]
    expected = [np.concatenate([lut[row // 2, 0, index] for index in indices[row].astype(int)]) for row in (0, 3)]
    np.testing.assert_array_equal(result, expected)


def test_forms_of_ios_16(builder: Any) -> None:
    data = RNG.integers(0, 256, (4, 12)).astype(np.uint8)
    scale = RNG.random(4).astype(np.float32)
    zero = RNG.integers(0, 256, 4).astype(np.uint8)
    lut = RNG.standard_normal(16).astype(np.float32)
    codes = RNG.integers(0, 16, 48).astype(np.uint8)
    packed = codes[::2] | (codes[1::2] << 4)
    mask = RNG.random((4, 12)) > 0.5
    sparse = RNG.standard_normal(int(mask.sum())).astype(np.float32)
    half = RNG.standard_normal((4, 12)).astype(np.float16)
    mb = builder.mb
    shape = np.array([4, 12], np.uint32)

    def body(x: Any) -> list[Any]:
        weights = (
            mb.constexpr_affine_dequantize(quantized_data=data, scale=scale, zero_point=zero, axis=0),
            mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=shape),
            mb.constexpr_sparse_to_dense(nonzero_data=sparse, mask=np.packbits(mask, bitorder="little"), shape=shape),
            mb.constexpr_cast(source_val=half, output_dtype="fp32"),
        )
        return [mb.add(x=x, y=weight, name=f"out{i}") for i, weight in enumerate(weights)]

    path = builder.save({"x": builder.placeholder((1,))}, body, target="iOS16")
    results = MilModel.open(path).session().predict({"x": [0.0]})
    dense = np.zeros((4, 12), np.float32)
    dense[mask] = sparse
    expected = [
        (data.astype(np.float32) - zero[:, None]) * scale[:, None],
        lut[codes].reshape(4, 12),
        dense,
        half.astype(np.float32),
    ]
    for index, array in enumerate(expected):
        np.testing.assert_array_equal(results[f"out{index}"], array)


def test_agrees_with_coremltools_own_decompression(builder: Any) -> None:
    """A package quantized by coremltools itself, against the weights that its loader materializes."""
    ct, mb = builder.ct, builder.mb
    weight = RNG.standard_normal((64, 64)).astype(np.float32)
    path = builder.save({"x": builder.placeholder((1, 64))}, lambda x: mb.linear(x=x, weight=weight, name="y"))
    coreml = coremltools_module("coremltools.optimize.coreml")
    settings = {"mode": "linear_symmetric", "dtype": "int4", "granularity": "per_block", "block_size": 32}
    config = coreml.OptimizationConfig(coreml.OpLinearQuantizerConfig(**settings))
    quantized_path = path.with_name("quantized.mlpackage")
    with builder.quiet():
        model = ct.models.MLModel(str(path), skip_model_load=True)
        coreml.linear_quantize_weights(model, config).save(str(quantized_path))
        del model
    load = coremltools_module("coremltools.converters.mil.frontend.milproto.load").load
    spec = ct.utils.load_spec(str(quantized_path))
    weights = quantized_path / "Data" / "com.apple.CoreML" / "weights"
    program = load(spec, spec.specificationVersion, file_weights_dir=str(weights))
    (reference,) = program.functions["main"].find_ops(op_type="constexpr_blockwise_shift_scale")
    opened = MilModel.open(quantized_path)
    (ours,) = (
        item
        for item in opened.constants().values()
        if item.type.shape == (64, 64) and item.keep and item.type.element.name == "fp32"
    )
    np.testing.assert_array_equal(ours.load(), reference.materialized_val_inference())
    x = RNG.standard_normal((1, 64)).astype(np.float32)
    y = opened.session().predict({"x": x})["y"]
    np.testing.assert_allclose(y, x @ ours.load().T, rtol=1e-6)
    assert 0 < np.abs(ours.load() - weight).max() < 0.5


def test_a_weight_is_dequantized_once_and_the_cache_is_bounded(builder: Any) -> None:
    data, scale = quantized(np.int8, -128, 127)
    path = gathered(builder, lambda mb: mb.constexpr_blockwise_shift_scale(data=data, scale=scale))
    (weight,) = (
        item for item in MilModel.open(path).constants().values() if item.type.element.name == "fp16" and item.keep
    )
    with_large_frame = ConstantCache(1 << 20)
    assert with_large_frame.value(weight) is with_large_frame.value(weight)
    assert with_large_frame.held_bytes == data.size * 2
    assert with_large_frame.widened(weight).dtype == np.float32
    tight = ConstantCache(data.size * 4)
    tight.value(weight)
    tight.widened(weight)
    assert tight.held_bytes == data.size * 4
    assert ConstantCache(10).value(weight).shape == data.shape
