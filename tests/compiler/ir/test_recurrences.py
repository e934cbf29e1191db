"""The recurrent ops against what transformers computes in chunks and token by token, and against themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from moec.compiler.ir.experts import ACTIVATIONS
from moec.compiler.ir.recurrences import CAUSAL_CONV, LINEAR_ATTENTION, UPDATE_RULES
from tests.support.one_op import Axes
from tests.support.op_cases import scan

LENGTHS = (1, 5, 64, 130)
"""Tokens: less than a chunk of transformers, one, and more than two."""


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, limit: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= limit * want.abs().max()


def unit(value: Tensor) -> Tensor:
    return value * torch.rsqrt(value.square().sum(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("form", [qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("length", LENGTHS)
def test_gated_delta_rule(form: Any, length: int) -> None:
    query, key, value = x(2, length, 2, 8), x(2, length, 2, 8, seed=1), x(2, length, 4, 6, seed=2)
    decay, beta, state = -x(2, length, 4, seed=3).exp(), x(2, length, 4, seed=4).sigmoid(), x(2, 4, 8, 6, seed=5)
    out, last = form(
        query, key, value, decay, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    got = LINEAR_ATTENTION(unit(query), unit(key), value, decay, beta, state, "gated_delta", 8**-0.5)
    close(got[0], out)
    close(got[1], last)


@pytest.mark.parametrize("form", [kimi.chunk_kimi_delta_attention, kimi.recurrent_kimi_delta_attention])
@pytest.mark.parametrize("length", LENGTHS)
def test_kimi_delta_attention(form: Any, length: int) -> None:
    query, key, value = x(2, length, 4, 8), x(2, length, 4, 8, seed=1), x(2, length, 4, 6, seed=2)
    decay, beta, state = -x(2, length, 4, 8, seed=3).exp(), x(2, length, 4, seed=4).sigmoid(), x(2, 4, 8, 6, seed=5)
    out, last = form(
        query, key, value, decay, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    got = LINEAR_ATTENTION(unit(query), unit(key), value, decay, beta, state, "gated_delta", 8**-0.5)
    close(got[0], out)
    close(got[1], last)


@pytest.mark.parametrize("length", LENGTHS)
def test_mamba2(length: int) -> None:
    """Values are x times its time step, keys B, queries C; the state of transformers is turned."""
    hidden, step, rate = x(2, length, 4, 6), x(2, length, 4, seed=1), -x(4, seed=2).exp()
    b, c, state = x(2, length, 2, 8, seed=3), x(2, length, 2, 8, seed=4), x(2, 4, 6, 8, seed=5)
    bias = x(4, seed=6)
    out, last = nemotron.mamba2_chunk_scan(
        hidden, step, rate, b, c, 16, dt_bias=bias, dt_softplus=True, initial_states=state, return_final_states=True
    )
    dt = F.softplus(step + bias)
    got = LINEAR_ATTENTION(c, b, hidden * dt[..., None], rate * dt, None, state.transpose(2, 3), "gated", 1.0)
    close(got[0], out)
    close(got[1].transpose(2, 3), last)


@pytest.mark.parametrize("length", [1, 5, 20])
def test_mamba(length: int) -> None:
    """A head for each channel, with values of width 1 and a decay for each key channel."""
    hidden, step, rate = x(2, 6, length), x(2, 6, length, seed=1), -x(6, 8, seed=2).exp()
    b, c = x(2, 8, length, seed=3), x(2, 8, length, seed=4)
    out, last = jamba.mamba_selective_scan(hidden, step, rate, b, c, delta_softplus=True, return_last_state=True)
    dt = F.softplus(step).transpose(1, 2)
    value = (hidden.transpose(1, 2) * dt)[..., None]
    query, key = (part.transpose(1, 2)[:, :, None] for part in (c, b))
    got = LINEAR_ATTENTION(query, key, value, dt[..., None] * rate, None, x(2, 6, 8, 1) * 0, "gated", 1.0)
    close(got[0][..., 0].transpose(1, 2), out)
    close(got[1][..., 0], last)


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_two_pieces_are_one_and_the_state_is_not_written_to(rule: str) -> None:
    query, key, value, decay, beta, state, _, scale = scan(Axes(2, 9), rule)
    kept = state.clone()

    def piece(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        cut = [None if item is None else item[:, start:stop] for item in (query, key, value, decay, beta)]
        out, last = LINEAR_ATTENTION(*cut, state, rule, scale)
        return out, last

    whole, last = piece(0, 9, state)
    first, between = piece(0, 4, state)
    second, end = piece(4, 9, between)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)
    assert torch.equal(state, kept)


def test_a_token_of_no_weight_leaves_the_state_alone() -> None:
    """What the hooks make of padding: a log decay of 0, and an update rate or a value of 0."""
    query, key, value, decay, beta, state, rule, scale = scan(Axes(2, 3), "gated_delta")
    _, last = LINEAR_ATTENTION(query, key, value, decay * 0, beta * 0, state, rule, scale)
    assert torch.equal(last, state)
    _, last = LINEAR_ATTENTION(query, key, value * 0, decay * 0, None, state, "gated", scale)
    assert torch.equal(last, state)


def test_half_precision_is_computed_in_single() -> None:
    arguments = scan(Axes(2, 20), "gated_delta")
    half = [item.half() if isinstance(item, Tensor) and place != 5 else item for place, item in enumerate(arguments)]
    wide = [item.float() if isinstance(item, Tensor) else item for item in half]
    (got, last), (want, exact) = LINEAR_ATTENTION(*half), LINEAR_ATTENTION(*wide)
    assert (got.dtype, last.dtype) == (torch.float16, torch.float32)
    assert torch.equal(got, want.half())
    assert torch.equal(last, exact)


@pytest.mark.parametrize(
    ("rule", "decay", "beta", "said"),
    [
        ("gated", False, False, "takes decay"),
        ("delta", True, True, "takes no decay"),
        ("sum", False, False, "not one of"),
    ],
)
def test_operands_that_do_not_fit_the_rule(rule: str, decay: bool, beta: bool, said: str) -> None:
    query, key, value, g, b, state, _, scale = scan(Axes(1, 2), "gated_delta")
    with pytest.raises(ValueError, match=said):
        LINEAR_ATTENTION(query, key, value, g if decay else None, b if beta else None, state, rule, scale)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_convolution_is_that_of_transformers(length: int, activation: str) -> None:
    inputs, weight, bias, state = x(2, 6, length), x(6, 1, 4, seed=1), x(6, seed=2), x(2, 6, 4, seed=3)
    kept = state.clone()
    name = None if activation == "identity" else activation
    want = qwen.causal_conv1d_update(inputs, kept, weight[:, 0], bias, name)
    for width in (3, 4, 6):
        padded = F.pad(state, (width - 4, 0))
        out, last = CAUSAL_CONV(inputs, weight, bias, padded, activation)
        close(out, want)
        if width == 4:
            assert torch.equal(last, kept)
        assert torch.equal(last, torch.cat([padded, inputs], -1)[..., -width:])
    assert set(ACTIVATIONS) >= {activation}
