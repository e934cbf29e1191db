import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.common.errors import CheckpointError, UsageError
from moec.compiler.ir.weights import Constant
from moec.quantize.formats import IntegerFormat, ScaleType
from moec.quantize.lazy import quantized
from moec.quantize.methods.rounding import Method, nearest_values, round_to_nearest
from moec.quantize.methods.scales import ClipSearch
from moec.quantize.methods.tensors import QuantizedTensor, stack

FORMATS = [
    IntegerFormat(8, "channel"),
    IntegerFormat(8, 32),
    IntegerFormat(8, 128, scale_type=ScaleType.FP32),
    IntegerFormat(4, 32),
    IntegerFormat(4, 64, scale_type=ScaleType.FP32),
    IntegerFormat(4, 128, symmetric=False),
    IntegerFormat(4, "channel"),
    IntegerFormat(4, 32, scale_type=ScaleType.BF16),
]
SEEDS = st.integers(0, 2**32 - 1)


def random_weight(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=SEEDS, chosen=st.sampled_from(FORMATS), magnitude=st.sampled_from([1e-7, 1e-4, 1.0, 1e3]))
@settings(max_examples=60, deadline=None)
def test_no_weight_is_off_by_more_than_half_a_scale(seed: int, chosen: IntegerFormat, magnitude: float) -> None:
    weight = random_weight(seed, 2, 5, 128) * magnitude
    tensor = round_to_nearest(weight, chosen, name="w").tensor
    scales = tensor.scales.float().repeat_interleave(tensor.block, -1)
    # fp16 may round a scale down by 2^-11, which clips the end of the range by up to 127 * 2^-11 of a scale.
    slack = 0.07 if chosen.scale_type is ScaleType.FP16 and chosen.bits == 8 else 0.02
    assert bool(((tensor.dequantize() - weight).abs() <= (0.5 + slack) * scales).all())


@given(seed=SEEDS, chosen=st.sampled_from(FORMATS))
@settings(max_examples=40, deadline=None)
def test_codes_scales_and_zero_points_are_in_range(seed: int, chosen: IntegerFormat) -> None:
    tensor = round_to_nearest(random_weight(seed, 4, 128) ** 3, chosen, name="w", clip=ClipSearch()).tensor
    low, high = chosen.code_range
    assert tensor.codes.dtype == torch.int8
    assert low <= int(tensor.codes.min())
    assert int(tensor.codes.max()) <= high
    assert tensor.scales.dtype == chosen.scale_type.dtype
    assert bool((tensor.scales > 0).all())
    unsigned = tensor.unsigned_codes().float() - tensor.unsigned_zero_points().repeat_interleave(tensor.block, -1)
    restored = unsigned * tensor.scales.float().repeat_interleave(tensor.block, -1)
    assert torch.equal(restored, tensor.dequantize())


@given(seed=SEEDS, chosen=st.sampled_from(FORMATS))
@settings(max_examples=40, deadline=None)
def test_quantized_weights_quantize_to_themselves(seed: int, chosen: IntegerFormat) -> None:
    weight = random_weight(seed, 3, 128)
    groups = 128 // chosen.block_length(128)
    weight.reshape(3, groups, -1)[..., 0] = -4.0
    weight.reshape(3, groups, -1)[..., 1] = 3.5
    once = round_to_nearest(weight, chosen, name="w").tensor
    twice = round_to_nearest(once.dequantize(), chosen, name="w").tensor
    # A scale that was rounded to fp16 need not be found again to the last bit.
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=0.0, atol=4e-3)
    assert torch.equal(twice.codes, once.codes)


@given(seed=SEEDS, chosen=st.sampled_from(FORMATS))
@settings(max_examples=40, deadline=None)
def test_clipping_never_raises_the_squared_error_of_a_group(seed: int, chosen: IntegerFormat) -> None:
    weight = random_weight(seed, 4, 128) ** 3
    plain, clipped = (
        round_to_nearest(weight, chosen, name="w", clip=clip).tensor for clip in (ClipSearch(1), ClipSearch())
    )
    errors = [
        (tensor.dequantize() - weight).square().reshape(4, -1, tensor.block).sum(-1) for tensor in (plain, clipped)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    if chosen.bits == 4 and chosen.symmetric:
        assert float(errors[1].sum()) < float(errors[0].sum())


@given(
    seed=SEEDS, chosen=st.sampled_from(FORMATS), magnitude=st.sampled_from([1e-7, 1.0]), steps=st.sampled_from([1, 4])
)
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_the_codes(seed: int, chosen: IntegerFormat, magnitude: float, steps: int) -> None:
    weight, clip = (random_weight(seed, 2, 5, 128) * magnitude).to(torch.bfloat16), ClipSearch(steps)
    before = weight.clone()
    values = nearest_values(weight, chosen, name="w", clip=clip)
    assert torch.equal(values, round_to_nearest(weight, chosen, name="w", clip=clip).tensor.dequantize())
    assert values.dtype is torch.float32
    assert torch.equal(nearest_values(weight.float(), chosen, name="w", clip=clip), values)
    assert torch.equal(weight, before)


@given(seed=SEEDS, chosen=st.sampled_from(FORMATS))
@settings(max_examples=20, deadline=None)
def test_a_lazy_tensor_reads_what_its_codes_say(seed: int, chosen: IntegerFormat) -> None:
    for shape in ((3, 8, 128), (40, 128)):
        tensor = quantized("w", Constant(random_weight(seed, *shape)), chosen)
        assert tensor.errors() == []
        for start, stop in ((0, shape[0]), (1, 3)):
            values = tensor.rows(start, stop)
            assert torch.equal(values, tensor.quantized_rows(start, stop).dequantize())
            assert values.shape == (stop - start, *shape[1:])
        assert tensor.errors()


def test_more_weights_than_fit_a_chunk_are_searched_alike() -> None:
    weight = random_weight(0, 4200, 128)
    whole = round_to_nearest(weight, IntegerFormat(4, 32), name="w", clip=ClipSearch()).tensor
    tail = round_to_nearest(weight[4100:], IntegerFormat(4, 32), name="w", clip=ClipSearch()).tensor
    assert torch.equal(whole.codes[4100:], tail.codes)
    assert torch.equal(whole.scales[4100:], tail.scales)


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
def test_constant_and_zero_experts(chosen: IntegerFormat) -> None:
    weight = torch.stack([torch.zeros(4, 128), torch.full((4, 128), 0.3), torch.full((4, 128), -0.3)])
    result = round_to_nearest(weight, chosen, name="w", clip=ClipSearch())
    restored = result.tensor.dequantize()
    assert not restored[0].any()
    assert result.matrices[0].error == 0
    eps = torch.finfo(chosen.scale_type.dtype).eps
    torch.testing.assert_close(restored[1:], weight[1:], rtol=eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_rounded_in_fp32(dtype: torch.dtype) -> None:
    weight = random_weight(1, 4, 64).to(dtype)
    result = round_to_nearest(weight, IntegerFormat(4), name="w").tensor
    assert torch.equal(result.codes, round_to_nearest(weight.float(), IntegerFormat(4), name="w").tensor.codes)
    assert result.format.granularity == 64


def test_the_report_holds_the_relative_squared_error() -> None:
    weight = random_weight(2, 2, 8, 64)
    result = round_to_nearest(weight, IntegerFormat(4), name="w")
    change = result.tensor.dequantize() - weight
    for report, lost, norm in zip(
        result.matrices, change.square().sum((1, 2)), weight.square().sum((1, 2)), strict=True
    ):
        assert report.error == pytest.approx(float(lost / norm), rel=1e-4)
        assert (report.method, report.tokens, report.reason) == (Method.RTN, 0, "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(value: float) -> None:
    weight = torch.zeros(2, 4, 128)
    weight[1, 2, 3] = value
    for fmt in FORMATS:
        for rounded in (round_to_nearest, nearest_values):
            with pytest.raises(CheckpointError, match="layers\\.1\\.down_proj: holds NaN or infinity"):
                rounded(weight, fmt, name="layers.1.down_proj", clip=ClipSearch(3))


def test_weights_beyond_fp16_scales_are_refused_and_fp32_scales_hold_them() -> None:
    weight = random_weight(3, 4, 32) * 1e7
    with pytest.raises(CheckpointError, match=r"lm_head: .* too large for fp16 scales"):
        round_to_nearest(weight, IntegerFormat(4), name="lm_head", clip=ClipSearch())
    restored = round_to_nearest(weight, IntegerFormat(4, scale_type=ScaleType.FP32), name="lm_head").tensor
    assert float((restored.dequantize() - weight).norm() / weight.norm()) < 0.2


@pytest.mark.parametrize("magnitude", [1e-8, 1e-6, 1e-4, 1.0, 1e4])
def test_scales_of_bf16_are_exact_in_half_precision_too(magnitude: float) -> None:
    weight = random_weight(3, 64, 128) * magnitude
    scales = round_to_nearest(weight, IntegerFormat(4, 32, scale_type=ScaleType.BF16), name="w").tensor.scales
    assert scales.dtype == torch.bfloat16
    assert torch.equal(scales.to(torch.float16).to(torch.float32), scales.to(torch.float32))


def test_weights_beyond_half_precision_are_refused_with_bf16_scales_too() -> None:
    with pytest.raises(CheckpointError, match="too large"):
        round_to_nearest(torch.full((1, 32), 1e6), IntegerFormat(4, 32, scale_type=ScaleType.BF16), name="w")


@pytest.mark.parametrize("shape", [(32,), (2, 2, 2, 32)])
def test_only_matrices_and_stacks_are_rounded(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="norm: shape"):
        round_to_nearest(torch.ones(shape), IntegerFormat(8), name="norm")


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match=r"layers.0.q_proj: block size 32 .* dimension 40"):
        round_to_nearest(torch.ones(4, 40), IntegerFormat(8, 32), name="layers.0.q_proj")


def test_a_row_that_no_block_divides_has_one_scale() -> None:
    rounded = round_to_nearest(random_weight(0, 4, 40), IntegerFormat(8), name="layers.0.q_proj")
    assert rounded.tensor.scales.shape == (4, 1)


def test_experts_are_stacked_and_taken_apart() -> None:
    whole = round_to_nearest(random_weight(4, 3, 4, 64), IntegerFormat(4, 32, symmetric=False), name="w").tensor
    again = stack([whole[expert] for expert in range(3)])
    assert torch.equal(again.dequantize(), whole.dequantize())
    with pytest.raises(ValueError, match="different formats"):
        stack([whole[0], round_to_nearest(torch.ones(4, 64), IntegerFormat(4, 64), name="w").tensor])


def test_a_quantized_tensor_is_consistent() -> None:
    codes = torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="scales have shape"):
        QuantizedTensor(IntegerFormat(4, 32), codes, torch.ones(4, 1))
    with pytest.raises(ValueError, match="zero points"):
        QuantizedTensor(IntegerFormat(4, 32, symmetric=False), codes, torch.ones(4, 2))
    with pytest.raises(ValueError, match="zero points have shape"):
        QuantizedTensor(
            IntegerFormat(4, 32, symmetric=False), codes, torch.ones(4, 2), torch.zeros(4, dtype=torch.int8)
        )
