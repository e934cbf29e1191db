"""The ops of layers with a state of fixed size instead of a KV cache: linear attention and short convolutions.

Importing this module registers them in the namespace `torch.ops.moec`. Their references go token by token and define
the ops, however a model or a runtime splits a prompt into chunks.

Gated delta networks, Kimi delta attention, Mamba, Mamba-2 and lightning attention are all `moec::linear_attention`;
`moec.compiler.frontend.scans` shows the operands for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.ir.experts import ACTIVATIONS

UPDATE_RULES = ("linear", "gated", "delta", "gated_delta")
"""How a token updates the state, with the names of ONNX."""

torch.library.define(
    "moec::linear_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, Tensor state, str update_rule, "
    "float scale) -> (Tensor, Tensor)",
)


@torch.library.impl("moec::linear_attention", "CompositeExplicitAutograd")
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    update_rule: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A scan over the tokens with a state of one matrix per head.

    For token t, with the state S, key k, value v, log decay g and update rate b of a head:

    ```
    linear       S = S + k v'                                  (arXiv 2006.16236)
    gated        S = exp(g) S + k v'                           (arXiv 2312.06635, 2405.21060)
    delta        S = S + b k (v - S' k)'                       (arXiv 2406.06484)
    gated_delta  S = exp(g) S;  S = S + b k (v - S' k)'        (arXiv 2412.06464, 2510.26692)
    output       scale * S' q
    ```

    Args:
        query: [B, S, Hq, Dk]. H is a multiple of Hq, and a query head serves consecutive value heads; or Hq is a
            multiple of H, and consecutive query heads share a value head.
        key: [B, S, Hk, Dk]; H is a multiple of Hk, and a key head serves consecutive value heads.
        value: [B, S, H, Dv].
        decay: Log of the decay, not positive: [B, S, H], or [B, S, H, Dk] with a decay per key channel; only for the
            gated rules.
        beta: Update rate, [B, S, H]; only for the delta rules.
        state: [B, H, Dk, Dv]; zeros before the first token.
        update_rule: One of `UPDATE_RULES`.
        scale: Factor on the output.

    Returns:
        Output [B, S, max(H, Hq), Dv] in the dtype of `value`, and the state after the last token in its own dtype.
        Both are computed in float32 (float64 for float64 values).

    Raises:
        ValueError: `decay` or `beta` is missing, or is given to a rule without it.
    """
    _check_rule(decay, beta, update_rule)
    exact = torch.promote_types(value.dtype, torch.float32)
    heads, groups = value.shape[2], max(query.shape[2] // value.shape[2], 1)
    query = query.to(exact).repeat_interleave(heads * groups // query.shape[2], 2)
    key, value_exact = key.to(exact).repeat_interleave(heads // key.shape[2], 2), value.to(exact)
    kept, outputs = state.to(exact), [value_exact.new_empty(value.shape[0], 0, heads * groups, value.shape[3])]
    for token in range(value.shape[1]):
        k, v = key[:, token, :, :, None], value_exact[:, token, :, None, :]
        if decay is not None:
            factor = decay[:, token].to(exact).exp()
            kept = kept * (factor[..., None, None] if factor.ndim == 2 else factor[..., None])
        if beta is not None:
            v = (v - (kept * k).sum(-2, keepdim=True)) * beta[:, token, :, None, None].to(exact)
        kept = kept + k * v
        read = kept.repeat_interleave(groups, 1) * query[:, token, :, :, None]
        outputs.append(scale * read.sum(-2)[:, None])
    return torch.cat(outputs, 1).to(value.dtype), kept.to(state.dtype, copy=True)


def _check_rule(decay: Tensor | None, beta: Tensor | None, update_rule: str) -> None:
    if update_rule not in UPDATE_RULES:
        raise ValueError(f"the update rule {update_rule!r} is not one of {', '.join(UPDATE_RULES)}")
    for name, operand, wanted in (("decay", decay, "gated"), ("beta", beta, "delta")):
        if (operand is not None) != (wanted in update_rule):
            raise ValueError(f"the update rule {update_rule} takes {name if operand is None else f'no {name}'}")


@torch.library.register_fake("moec::linear_attention")  # type: ignore[untyped-decorator]
def _(
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    update_rule: str,
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    _check_rule(decay, beta, update_rule)
    batch, length, heads, width = value.shape
    return value.new_empty(batch, length, max(heads, query.shape[2]), width), torch.empty_like(state)


torch.library.define(
    "moec::causal_conv", "(Tensor x, Tensor weight, Tensor? bias, Tensor state, str activation) -> (Tensor, Tensor)"
)


@torch.library.impl("moec::causal_conv", "CompositeExplicitAutograd")
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """A short causal depthwise convolution (arXiv 2111.00396 and later, before the scan).

    `y[t] = activation(bias + sum over j of weight[j] * x[t - K + 1 + j])`; inputs of earlier steps come from the state.

    Args:
        x: [B, C, S].
        weight: [C, 1, K].
        bias: [C] or None.
        state: Last inputs of earlier steps, [B, C, W] with W at least K - 1; zeros before the first token. Models of
            transformers keep W = K inputs, kernels of ONNX Runtime K - 1.
        activation: A key of `moec.compiler.ir.experts.ACTIVATIONS`.

    Returns:
        Output [B, C, S], and the new state: the last W inputs, [B, C, W].
    """
    joined = torch.cat([state.to(x.dtype), x], dim=-1)
    taken = joined[..., state.shape[-1] + 1 - weight.shape[-1] :]
    out = F.conv1d(taken, weight, bias, groups=x.shape[1])
    kept = joined[..., joined.shape[-1] - state.shape[-1] :]
    return ACTIVATIONS[activation](out), kept.to(state.dtype, copy=True)


@torch.library.register_fake("moec::causal_conv")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    state: Tensor,
    activation: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(state)


LINEAR_ATTENTION = torch.ops.moec.linear_attention.default
CAUSAL_CONV = torch.ops.moec.causal_conv.default
