"""Replacements for the scan and convolution functions of recurrent layers of transformers, which emit moec's ops.

The modeling files of transformers keep each scan, and the short convolution before it, in a module-level function that
has the same name in every family, so that kernels of other packages can replace it. While a model is traced, the
functions of this module do; no family is named. Neither the layer nor, in some families, its state is among the
arguments, so both are taken from the module that runs.

```
gated delta rule       S = exp(g) S;  S = S + b k (v - S' k)'     a decay per head         (arXiv 2412.06464)
Kimi delta attention   the same                                   a decay per key channel  (arXiv 2510.26692)
Mamba-2                S = exp(A dt) S + B (dt x)'                a decay per head         (arXiv 2405.21060)
Mamba                  the same, a head for each channel          a decay per key channel  (arXiv 2312.00752)
```

Padding does not change a state: a padding token has log decay 0 and update rate (or value) 0, and a convolution gets
zeros for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend.activations import activation_name
from moec.compiler.frontend.recording import Recording, active_record
from moec.compiler.ir.experts import ACTIVATIONS

L2_EPS = 1e-6
"""Epsilon that flash-linear-attention and transformers add to the sum of squares of queries and keys."""


def scans_as_ops(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Replace the functions in the modeling files of `model` by those of `FUNCTIONS`, inside the block."""
    return _replaced(model, lambda scope: {name: FUNCTIONS[name] for name in FUNCTIONS.keys() & scope.keys()})


def scans_token_by_token(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let transformers scan prompts token by token too, as it does for single tokens, inside the block.

    The parity gate uses this for its reference. The chunked form of a scan subtracts sums of log decays: with strong
    decays its error is 1e-5, that of the form by token 1e-7, and the norm after the scan amplifies it.
    """
    return _replaced(model, lambda scope: {name: scope[one] for name, one in STEPS.items() if name in scope})


@contextlib.contextmanager
def _replaced(model: nn.Module, chosen: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Iterator[None]:
    """Replace names in the modeling files of `model`, and restore them afterwards.

    Args:
        model: The model.
        chosen: The names of a modeling file -> the names to replace, with their new values.
    """
    files = {type(module).__module__ for module in model.modules()}
    scopes = [vars(sys.modules[file]) for file in sorted(files & sys.modules.keys())]
    replaced = [(scope, dict(chosen(scope))) for scope in scopes]
    kept = [(scope, {name: scope[name] for name in functions}) for scope, functions in replaced]
    for scope, functions in replaced:
        scope.update(functions)
    try:
        yield
    finally:
        for scope, functions in kept:
            scope.update(functions)


def emit_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    *,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    """Call `moec::linear_attention` for the layer that runs; adapters use this too.

    Args:
        query: [B, S, Hq, Dk].
        key: [B, S, Hk, Dk].
        value: [B, S, H, Dv].
        decay: Log decay, [B, S, H] or [B, S, H, Dk]; None for a rule without decay.
        beta: Update rate, [B, S, H], for the delta rules; else None.
        scale: Factor on the output.
        delta: Whether the update rule is a delta rule.

    Returns:
        Output [B, S, max(H, Hq), Dv], and the new state [B, H, Dk, Dv] in float32.
    """
    record, layer = active_record(), active_record().layer()
    shape = (value.shape[2], key.shape[3], value.shape[3])
    state = record.state(layer, "recurrent", tuple(int(size) for size in shape), torch.float32)
    if state is None:
        heads = max(value.shape[2], query.shape[2])
        out = value.new_empty(*value.shape[:2], heads, value.shape[3])
        return out, value.new_empty(value.shape[0], *shape, dtype=torch.float32)
    rule = ("gated_delta" if delta else "gated") if decay is not None else ("delta" if delta else "linear")
    out, present = torch.ops.moec.linear_attention(query, key, value, decay, beta, state, rule, scale)
    record.present[layer, "recurrent"] = present
    return out, present


def causal_conv(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **_: Any
) -> Tensor:
    """Replaces `causal_conv1d_fn`, which a layer calls after `update_conv_state` of the cache.

    Args:
        hidden_states: [B, C, S].
        weight: [C, K].
        bias: [C] or None.
        activation: A name or a function of transformers, or None.

    Returns:
        [B, C, S].

    Raises:
        UnsupportedModelError: The layer did not ask the cache to keep the inputs, or the activation is not known.
    """
    record = active_record()
    layer = record.layer()
    kept = record.conv_inputs.pop(layer, None)
    if kept is None:
        raise UnsupportedModelError(f"{record.where()} convolves without keeping its last inputs in the cache")
    state = record.state(layer, "conv", (int(hidden_states.shape[1]), kept), hidden_states.dtype)
    if state is None:
        return torch.empty_like(hidden_states)
    masked = (hidden_states * record.token_mask(hidden_states)[:, None, :]).to(weight.dtype)
    name = _activation(activation, record)
    out, present = torch.ops.moec.causal_conv(masked, weight.unsqueeze(1), bias, state, name)
    record.present[layer, "conv"] = present
    result: Tensor = out.to(hidden_states.dtype)
    return result


def _activation(activation: Any, record: Recording) -> str:
    """The key of `ACTIVATIONS` for the activation of a convolution: a name of transformers, a function or None."""
    if activation is None:
        return "identity"
    if isinstance(activation, str):
        if activation in ACTIVATIONS:
            return activation
        from transformers.activations import ACT2FN

        activation = ACT2FN[activation]
    return activation_name(activation, record.where())


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *_: Any,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule: a gated delta network if `g` has a decay per head, Kimi delta attention if per key channel.

    Args:
        query: [B, S, Hk, Dk].
        key: [B, S, Hk, Dk].
        value: [B, S, H, Dv].
        g: Log decay, [B, S, H] or [B, S, H, Dk].
        beta: Update rate, [B, S, H].
        use_qk_l2norm_in_kernel: Whether queries and keys are normalized to unit length first.

    Returns:
        Output [B, S, H, Dv], and the new state [B, H, Dk, Dv] in float32.
    """
    width, dtype = key.shape[-1], value.dtype
    scale = width**-0.5
    query, key = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        # A vector of unit length has a root mean square of 1 / sqrt(Dk); for queries the factor moves to the output.
        query, key = (torch.ops.moec.rms_norm(item, None, L2_EPS / width) for item in (query, key))
        key, scale = key * width**-0.5, scale * width**-0.5
    mask = active_record().token_mask(beta)[:, :, None].float()
    decay = g.float() * (mask if g.ndim == 3 else mask[..., None])
    out, state = emit_scan(query, key, value.float(), decay, beta.float() * mask, scale, delta=True)
    return out.to(dtype), state


def mamba2_scan(
    hidden_states: Tensor,
    dt: Tensor,
    rate: Tensor,
    key: Tensor,
    query: Tensor,
    *_: Any,
    D: Tensor | None = None,  # noqa: N803 - it is given by this name
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **__: Any,
) -> Any:
    """Replaces `mamba2_chunk_scan`: keys are B, queries C, and values the inputs times their time step.

    Args:
        hidden_states: x, [B, S, H, P].
        dt: Time step, [B, S, H].
        rate: A, the rate of the decay, negative, [H].
        key: B, [B, S, groups, N].
        query: C, [B, S, groups, N].
        D: Factor on the skip connection around the scan, [H].
        z: Gate, [B, S, H, P].
        dt_bias: [H].
        dt_softplus: Whether a softplus makes the time step positive.
        dt_limit: Bounds of the time step.
        return_final_states: Whether the state is returned too, as [B, H, P, N].

    Returns:
        Output [B, S, H, P] in float32, with the state if it is asked for.
    """
    dt = _time_step(dt, dt_bias, dt_softplus, dt_limit) * active_record().token_mask(dt)[:, :, None].float()
    x = hidden_states.float()
    out, state = emit_scan(query.float(), key.float(), x * dt[..., None], dt * rate.float(), None, 1.0, delta=False)
    if D is not None:
        out = out + x * D.float()[:, None]
    if z is not None:
        out = out * F.silu(z.float())
    return (out, state.transpose(2, 3)) if return_final_states else out


def mamba_scan(
    hidden_states: Tensor,
    dt: Tensor,
    rate: Tensor,
    key: Tensor,
    query: Tensor,
    D: Tensor | None = None,  # noqa: N803 - it is given by this name
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Replaces `mamba_selective_scan`: each channel is a head with values of width 1 and a decay per key channel.

    Args:
        hidden_states: x, [B, E, S].
        dt: Time step, [B, E, S].
        rate: A, the rate of the decay, negative, [E, N].
        key: B, [B, N, S].
        query: C, [B, N, S].
        D: Factor on the skip connection around the scan, [E].
        z: Gate, [B, E, S].
        delta_bias: [E].
        delta_softplus: Whether a softplus makes the time step positive.
        return_last_state: Whether the state is returned too, as [B, E, N].

    Returns:
        Output [B, E, S] in float32, with the state if it is asked for.
    """
    step = _time_step(dt.transpose(1, 2), delta_bias, delta_softplus, (0.0, float("inf")))
    step = step * active_record().token_mask(step)[:, :, None].float()
    x = hidden_states.transpose(1, 2).float()
    query, key = (item.transpose(1, 2)[:, :, None].float() for item in (query, key))
    decay = step[..., None] * rate.float()
    out, state = emit_scan(query, key, (x * step)[..., None], decay, None, 1.0, delta=False)
    out = out[..., 0]
    if D is not None:
        out = out + x * D.float()
    if z is not None:
        out = out * F.silu(z.transpose(1, 2).float())
    out = out.transpose(1, 2)
    return (out, state[..., 0]) if return_last_state else out


def _time_step(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """The time step in float32: the projection `dt` plus bias, after softplus and clamping."""
    step = dt.float() if bias is None else dt.float() + bias.float()
    step = F.softplus(step) if softplus else step
    low, high = limit
    if softplus and low <= 0 and high == float("inf"):
        return step  # softplus is positive
    return step.clamp(low, None if high == float("inf") else high)


def _unmasked(hidden_states: Tensor, _: Tensor | None) -> Tensor:
    """Replaces `apply_mask_to_padding_states`: the scans and convolutions here mask padding themselves."""
    return hidden_states


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "apply_mask_to_padding_states": _unmasked,
    "causal_conv1d_fn": causal_conv,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": mamba2_scan,
    "mamba_selective_scan": mamba_scan,
}
"""Name of a function in the modeling files of transformers -> its replacement."""

STEPS: Mapping[str, str] = {
    "torch_chunk_gated_delta_rule": "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "recurrent_kimi_delta_attention",
}
"""Name of a chunked scan of transformers -> the name of the same scan token by token."""
