import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.common.errors import CheckpointError, UsageError
from moec.quantize.formats import IntegerFormat
from moec.quantize.methods.gptq import GptqOptions, _inverse_factor, gptq
from moec.quantize.methods.hessian import Hessian
from moec.quantize.methods.rounding import Method, round_to_nearest
from moec.quantize.methods.scales import ClipSearch

INT4 = IntegerFormat(4, 32)
PLAIN = GptqOptions(refinements=0, activation_order=False, clip=ClipSearch(1))


def correlated(seed: int, tokens: int, dimension: int) -> torch.Tensor:
    """Inputs of low rank with a little noise, and channels of unequal size: [tokens, dimension]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension // 4, dimension, generator=generator)
    inputs = torch.randn(tokens, dimension // 4, generator=generator) @ mixing
    inputs += 0.1 * torch.randn(tokens, dimension, generator=generator)
    return inputs * torch.rand(dimension, generator=generator)


def case(seed: int, experts: int = 2, tokens: int = 300) -> tuple[torch.Tensor, list[torch.Tensor], list[Hessian]]:
    weight = torch.randn(experts, 24, 64, generator=torch.Generator().manual_seed(seed))
    inputs = [correlated(seed + expert, tokens, 64) for expert in range(experts)]
    hessians = []
    for expert, tokens_seen in enumerate(inputs):
        hessians.append(Hessian(64, f"expert {expert}"))
        hessians[-1].add(tokens_seen)
    return weight, inputs, hessians


def output_errors(weight: torch.Tensor, restored: torch.Tensor, inputs: list[torch.Tensor]) -> list[float]:
    return [
        float((tokens @ (after - before).T).square().sum() / (tokens @ before.T).square().sum())
        for before, after, tokens in zip(weight, restored, inputs, strict=True)
    ]


@given(seed=st.integers(0, 10_000), symmetric=st.booleans(), order=st.booleans())
@settings(max_examples=20, deadline=None)
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(seed: int, symmetric: bool, order: bool) -> None:
    weight, inputs, hessians = case(seed)
    chosen = IntegerFormat(4, 32, symmetric=symmetric)
    nearest = round_to_nearest(weight, chosen, name="w", clip=ClipSearch()).tensor.dequantize()
    result = gptq(weight, hessians, chosen, name="w", options=GptqOptions(activation_order=order))
    errors = output_errors(weight, result.tensor.dequantize(), inputs)
    for ours, theirs in zip(errors, output_errors(weight, nearest, inputs), strict=True):
        assert ours < 0.6 * theirs
    assert [report.error for report in result.matrices] == pytest.approx(errors, rel=1e-2)


def test_it_is_the_algorithm_of_the_paper() -> None:
    """One column at a time, with the inverse Hessian eliminated explicitly as in equations 2 and 3."""
    weight, _, hessians = case(5, experts=1)
    damped = hessians[0].mean().double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(64)
    inverse = damped.inverse()
    scales = round_to_nearest(weight[0], INT4, name="w").tensor.scales.double().repeat_interleave(32, -1)
    rest, codes = weight[0].double(), torch.empty(24, 64)
    for column in range(64):
        codes[:, column] = (rest[:, column] / scales[:, column]).round().clamp(-8, 7)
        error = (rest[:, column] - codes[:, column] * scales[:, column]) / inverse[column, column]
        rest = rest - error[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    for update_block in (1, 7, 64, 100):
        options = GptqOptions(refinements=0, activation_order=False, clip=ClipSearch(1), update_block=update_block)
        found = gptq(weight[0], hessians, INT4, name="w", options=options).tensor.codes
        # fp32 against fp64: a tie may fall to the other side and move its row a little.
        assert float((found == codes).float().mean()) > 0.99


@given(seed=st.integers(0, 10_000), symmetric=st.booleans())
@settings(max_examples=15, deadline=None)
def test_each_refinement_lowers_the_error(seed: int, symmetric: bool) -> None:
    weight, inputs, hessians = case(seed)
    chosen = IntegerFormat(4, 32, symmetric=symmetric)
    errors = [
        sum(
            output_errors(
                weight,
                gptq(
                    weight, hessians, chosen, name="w", options=GptqOptions(refinements=rounds, damping=1e-4)
                ).tensor.dequantize(),
                inputs,
            )
        )
        for rounds in (0, 1, 3)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_the_order_of_activations_helps_when_channels_differ() -> None:
    weight, inputs, hessians = case(11, experts=4)
    unordered, ordered = (
        sum(
            output_errors(
                weight,
                gptq(
                    weight,
                    hessians,
                    INT4,
                    name="w",
                    options=GptqOptions(refinements=0, activation_order=order),
                ).tensor.dequantize(),
                inputs,
            )
        )
        for order in (False, True)
    )
    assert ordered < unordered


def test_an_expert_is_rounded_alike_alone_and_in_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, hessians = case(7, experts=3)
    whole = gptq(weight, hessians, INT4, name="w")
    again = gptq(weight, hessians, INT4, name="w")
    assert torch.equal(whole.tensor.codes, again.tensor.codes)
    assert torch.equal(whole.tensor.scales, again.tensor.scales)
    assert whole.matrices == again.matrices
    monkeypatch.setattr("moec.quantize.methods.gptq.BATCH", 1)
    single = gptq(weight, hessians, INT4, name="w").tensor
    assert float((single.codes == whole.tensor.codes).float().mean()) > 0.99
    alone = gptq(weight[1], hessians[1:2], INT4, name="w").tensor
    assert torch.equal(alone.codes, single.codes[1])


def test_experts_with_too_few_tokens_fall_back_and_say_so() -> None:
    weight, _, hessians = case(3, experts=4)
    hessians[1], hessians[3] = Hessian(64, "unseen"), Hessian(64, "rare")
    hessians[3].add(correlated(1, 5, 64))
    options = GptqOptions(minimum_tokens=6)
    result = gptq(weight, hessians, INT4, name="w", options=options)
    nearest = round_to_nearest(weight, INT4, name="w", clip=options.clip)
    assert [report.method for report in result.matrices] == [Method.GPTQ, Method.RTN, Method.GPTQ, Method.RTN]
    assert [report.tokens for report in result.matrices] == [300, 0, 300, 5]
    assert result.matrices[1].reason == "0 calibration tokens, fewer than 6"
    assert result.matrices[3].reason == "5 calibration tokens, fewer than 6"
    assert result.matrices[0].reason == ""
    assert result.matrices[1].error == pytest.approx(nearest.matrices[1].error, rel=1e-4)
    for expert in (1, 3):
        assert torch.equal(result.tensor.codes[expert], nearest.tensor.codes[expert])
        assert torch.equal(result.tensor.scales[expert], nearest.tensor.scales[expert])
    assert not torch.equal(result.tensor.codes[0], nearest.tensor.codes[0])


def test_fewer_tokens_than_dimensions_is_regular() -> None:
    weight, _, _ = case(4, experts=1)
    hessian = Hessian(64, "w")
    hessian.add(correlated(1, 8, 64))
    result = gptq(weight[0], [hessian], INT4, name="w", options=GptqOptions(minimum_tokens=1, damping=1e-8))
    assert bool(result.tensor.dequantize().isfinite().all())
    assert result.matrices[0].error < 0.01


def test_inputs_that_are_all_zero_round_to_nearest() -> None:
    weight, _, _ = case(4, experts=1)
    hessian = Hessian(64, "w")
    hessian.add(torch.zeros(200, 64))
    result = gptq(weight[0], [hessian], INT4, name="w", options=PLAIN)
    assert torch.equal(result.tensor.codes, round_to_nearest(weight[0], INT4, name="w").tensor.codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_and_constant_experts(symmetric: bool) -> None:
    weight, _, hessians = case(6, experts=3)
    weight[0], weight[1] = 0.0, 0.25
    result = gptq(weight, hessians, IntegerFormat(4, 32, symmetric=symmetric), name="w")
    assert not result.tensor.dequantize()[0].any()
    assert result.matrices[0].error == 0
    assert result.matrices[1].error < 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value: float) -> None:
    weight, inputs, hessians = case(6)
    weight[1, 0, 0] = value
    with pytest.raises(CheckpointError, match="layers\\.2\\.up: holds NaN or infinity"):
        gptq(weight, hessians, INT4, name="layers.2.up")
    inputs[0][3, 3] = value
    with pytest.raises(CheckpointError, match="expert 0: its calibration inputs hold NaN or infinity"):
        hessians[0].add(inputs[0])


def test_usage_is_checked() -> None:
    weight, _, hessians = case(6)
    with pytest.raises(UsageError, match="block size 128 does not divide"):
        gptq(weight, hessians, IntegerFormat(4, 128), name="w")
    with pytest.raises(ValueError, match="2 matrices, 1 Hessians"):
        gptq(weight, hessians[:1], INT4, name="w")


@pytest.mark.parametrize("option", [{"damping": 0.0}, {"refinements": -1}, {"update_block": 0}, {"minimum_tokens": 0}])
def test_options_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"GPTQ option {next(iter(option))}="):
        GptqOptions(**option)  # type: ignore[arg-type]


def test_hessian_sums_outer_products_with_weights() -> None:
    inputs = correlated(0, 50, 64)
    weights = torch.rand(50, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(64, "w")
    assert not hessian.mean().any()
    hessian.add(inputs[:20].reshape(4, 5, 64), weights[:20].reshape(4, 5))
    hessian.add(inputs[20:20])
    hessian.add(inputs[20:], weights[20:])
    assert hessian.tokens == 50
    torch.testing.assert_close(hessian.mean(), inputs.T @ torch.diag(weights) @ inputs / 50)
    assert torch.equal(hessian.mean(), hessian.mean().mT)


def test_the_inverse_factor_survives_an_indefinite_matrix() -> None:
    matrix = torch.eye(4)[None].repeat(2, 1, 1)
    matrix[1, 0, 0] = -1e-3
    factor = _inverse_factor(matrix)
    torch.testing.assert_close(factor[0], torch.eye(4))
    assert bool(factor.isfinite().all())


def test_the_width_of_the_updates_changes_nothing_but_speed() -> None:
    weight, inputs, hessians = case(9, experts=1)
    narrow, wide = (
        gptq(weight, hessians, INT4, name="w", options=GptqOptions(refinements=2, update_block=columns)).tensor
        for columns in (5, 64)
    )
    assert float((narrow.codes == wide.codes).float().mean()) > 0.98
    errors = [output_errors(weight, tensor.dequantize(), inputs)[0] for tensor in (narrow, wide)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
