"""The semantic ops of moec: schemas, references and shape functions.

Importing this module registers them in the namespace `torch.ops.moec`. Every target is compared with the references,
which are written for clarity and exactness.

The contract of dynamic routing: `moec::experts` drops a slot whose weight is exactly 0. The slot contributes exactly
nothing, even if its expert would yield NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ir.experts import ExpertWeights, Gate, run_experts

torch.library.define(
    "moec::experts",
    "(Tensor hidden_states, Tensor indices, Tensor weights, Tensor gate_up_proj, Tensor? gate_up_bias, "
    "Tensor down_proj, Tensor? down_bias, str activation, bool gated, bool interleaved, bool transposed, "
    "float alpha, float limit, float up_offset, bool limit_activated=False) -> Tensor",
)


@torch.library.impl("moec::experts", "CompositeExplicitAutograd")
def experts(
    hidden_states: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    alpha: float,
    limit: float,
    up_offset: float,
    limit_activated: bool = False,
) -> Tensor:
    """The feed-forward experts of one layer.

    Args:
        hidden_states: [T, H].
        indices: [T, k] integer, in any order; within a row, those with a weight other than 0 are distinct.
        weights: [T, k]; a weight of exactly 0 drops the slot.
        gate_up_proj: [E, 2I, H] ([E, I, H] without gate), or its last two axes swapped where `transposed`.
        gate_up_bias: [E, 2I] or None.
        down_proj: [E, H, I], or its last two axes swapped where `transposed`.
        down_bias: [E, H] or None.
        activation: A key of `moec.compiler.ir.experts.ACTIVATIONS`, and a field of `moec.compiler.ir.experts.Gate`.
        gated: See `Gate`.
        interleaved: See `Gate`.
        transposed: Whether the projections are stored [in, out].
        alpha: See `Gate`.
        limit: See `Gate`.
        up_offset: See `Gate`.
        limit_activated: See `Gate`.

    Returns:
        [T, H].
    """

    def expert(index: int) -> ExpertWeights:
        gate_up, down = gate_up_proj[index], down_proj[index]
        return ExpertWeights(
            gate_up.T if transposed else gate_up,
            down.T if transposed else down,
            None if gate_up_bias is None else gate_up_bias[index],
            None if down_bias is None else down_bias[index],
        )

    gate = Gate(activation, gated, interleaved, alpha, limit, up_offset, limit_activated)
    return run_experts(hidden_states, indices, weights, gate, expert)


@torch.library.register_fake("moec::experts")  # type: ignore[untyped-decorator]
def _(hidden_states: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden_states)


torch.library.define("moec::select", "(Tensor weights, Tensor keep, bool renormalize) -> Tensor")


@torch.library.impl("moec::select", "CompositeExplicitAutograd")
def select(weights: Tensor, keep: Tensor, renormalize: bool) -> Tensor:
    """Drop the routing slots that a policy does not keep.

    Args:
        weights: [T, k], not negative.
        keep: [T, k] or [1, k] bool, true for kept slots. The pass that inserts the op ensures that the slot with the
            largest weight of every row is kept.
        renormalize: Whether the kept weights are rescaled to the original sum of the row.

    Returns:
        [T, k]: dropped slots are exactly 0, and a row of zeros stays a row of zeros.
    """
    kept = torch.where(keep, weights, 0)
    if renormalize:
        total = kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        kept = kept * (weights.sum(dim=-1, keepdim=True) / total)
    return kept


@torch.library.register_fake("moec::select")  # type: ignore[untyped-decorator]
def _(weights: Tensor, keep: Tensor, renormalize: bool) -> Tensor:  # noqa: ARG001
    return torch.empty_like(weights)


torch.library.define(
    "moec::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, Tensor cache_position, "
    "Tensor? attention_mask, Tensor? sinks, float scale, str kind, int window, float softcap, "
    "Tensor? selected=None, Tensor? key_scale=None, Tensor? value_scale=None) "
    "-> (Tensor, Tensor, Tensor)",
)


def visible(cache_position: Tensor, total: int, attention_mask: Tensor | None, kind: str, window: int) -> Tensor:
    """The mask of attention: which cached tokens each new token may attend to.

    Args:
        cache_position: Slot of each new token in the cache, [S].
        total: Number of slots T.
        attention_mask: [B, T], nonzero where the slot holds a token; None where all do.
        kind: "causal", "sliding" (the last `window` slots) or "chunked" (the slots of the same chunk of `window` slots,
            counted from the first token after the padding).
        window: Size for "sliding" and "chunked".

    Returns:
        [B or 1, S, T] bool.
    """
    query, slot = cache_position[:, None], torch.arange(total)[None, :]
    allowed = (slot <= query)[None]
    if kind == "sliding":
        allowed = allowed & (slot > query - window)
    if attention_mask is not None:
        mask = attention_mask.to(torch.bool)
        if kind == "chunked":
            padding = (mask.cumsum(-1) == 0).sum(-1)[:, None, None]
            allowed = allowed & ((slot - padding) // window == (query - padding) // window)
        return allowed & mask[:, None, :]
    if kind == "chunked":
        allowed = allowed & (slot // window == query // window)
    return allowed


@torch.library.impl("moec::attention", "CompositeExplicitAutograd")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    cache_position: Tensor,
    attention_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    kind: str,
    window: int,
    softcap: float,
    selected: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled dot product attention over a growing KV cache, whose layout each target chooses.

    With scales, the cache holds codes (`to_codes`), and attention reads all keys and values as codes times scale, those
    of the new tokens too.

    Args:
        query: [B, Hq, S, D], rotary embedding applied.
        key: [B, Hkv, S, D]; Hq is a multiple of Hkv.
        value: [B, Hkv, S, Dv].
        past_key: [B, Hkv, P, D]; int8 with scales.
        past_value: [B, Hkv, P, Dv]; int8 with scales.
        cache_position: Slots of the new tokens in the cache, [S] int64: P, P + 1, ...
        attention_mask: [B, P + S] integer or bool, 0 where the slot is padding; None without padding.
        sinks: Logit per head that joins the softmax and is then dropped, [Hq] (gpt-oss), or None.
        scale: Factor on the logits.
        kind: "causal", "sliding" or "chunked"; see `visible`.
        window: See `visible`.
        softcap: `cap * tanh(logits / cap)` where it is not 0 (Gemma 2).
        selected: Of the visible slots, those to attend to, [B, S, P + S] bool (see `moec::indexer`); None: all.
        key_scale: Scale of each channel of the keys in the cache, [Hkv, D] float32; None: the cache holds the keys.
        value_scale: Likewise of the values, [Hkv, Dv]; given if and only if `key_scale` is.

    Returns:
        Output [B, S, Hq, Dv], present key [B, Hkv, P + S, D] and present value [B, Hkv, P + S, Dv], in the dtype of the
        past. A padding token that may attend to nothing yields the mean over all slots, as in the eager mode of
        transformers, and not NaN.
    """
    present_key, keys = _appended(past_key, key, key_scale)
    present_value, values = _appended(past_value, value, value_scale)
    groups = query.shape[1] // keys.shape[1]
    logits = torch.matmul(query, keys.repeat_interleave(groups, 1).transpose(-1, -2)).float() * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    allowed = visible(cache_position, keys.shape[2], attention_mask, kind, window)
    if selected is not None:
        allowed = allowed & selected
    logits = logits.masked_fill(~allowed[:, None], torch.finfo(logits.dtype).min)
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
        logits = torch.cat([logits, column], dim=-1)
    probabilities = logits.softmax(-1)[..., : keys.shape[2]].to(values.dtype)
    out = torch.matmul(probabilities, values.repeat_interleave(groups, 1))
    return out.transpose(1, 2).contiguous(), present_key, present_value


def to_codes(values: Tensor, scale: Tensor) -> Tensor:
    """Keys or values [B, H, S, D] as codes of a cache: values / scale [H, D], to nearest, halves to even, int8."""
    codes = (values.float() / scale[:, None]).round()
    return codes.clamp(torch.iinfo(torch.int8).min, torch.iinfo(torch.int8).max).to(torch.int8)


def _appended(past: Tensor, new: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The cache after `new` tokens, and what attention reads of it, in the dtype of `new`."""
    if scale is None:
        present = torch.cat([past, new], dim=2)
        return present, present
    present = torch.cat([past, to_codes(new, scale)], dim=2)
    return present, (present.float() * scale[:, None]).to(new.dtype)


@torch.library.register_fake("moec::attention")  # type: ignore[untyped-decorator]
def _(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, _depth = query.shape
    total = past_key.shape[2] + key.shape[2]
    return (
        query.new_empty(batch, length, heads, value.shape[-1]),
        past_key.new_empty(batch, key.shape[1], total, key.shape[-1]),
        past_value.new_empty(batch, value.shape[1], total, past_value.shape[-1]),
    )


torch.library.define("moec::rms_norm", "(Tensor hidden_states, Tensor? weight, float eps) -> Tensor")


@torch.library.impl("moec::rms_norm", "CompositeExplicitAutograd")
def rms_norm(hidden_states: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, in float32 (arXiv 1910.07467).

    Args:
        hidden_states: [..., H].
        weight: [H], or None for a norm without weight.
        eps: Added to the mean square.

    Returns:
        [..., H] in the dtype of `hidden_states`.
    """
    x = hidden_states.float()
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(hidden_states.dtype)
    return normed if weight is None else normed * weight.to(normed.dtype)


@torch.library.register_fake("moec::rms_norm")  # type: ignore[untyped-decorator]
def _(hidden_states: Tensor, weight: Tensor | None, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(hidden_states)


torch.library.define("moec::rotary", "(Tensor x, Tensor cos, Tensor sin) -> Tensor")


@torch.library.impl("moec::rotary", "CompositeExplicitAutograd")
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split form: `x * cos + [-x2, x1] * sin` (arXiv 2104.09864).

    Args:
        x: [B, heads, S, D].
        cos: [B or 1, 1, S, D], both halves alike.
        sin: Like `cos`.

    Returns:
        [B, heads, S, D].
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@torch.library.register_fake("moec::rotary")  # type: ignore[untyped-decorator]
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


EXPERTS = torch.ops.moec.experts.default
ATTENTION = torch.ops.moec.attention.default
SELECT = torch.ops.moec.select.default
RMS_NORM = torch.ops.moec.rms_norm.default
ROTARY = torch.ops.moec.rotary.default
