"""The hooks through which transformers speaks moec's ops while a model is traced.

Three registries of transformers are used under the name "moec": experts functions, attention functions and mask
functions. The cache of `moec.compiler.frontend.step_cache` hands the past to the attention function, so that appending
to it is part of `moec::attention`; what recurrent layers call is in `moec.compiler.frontend.scans`. No model is known
here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend.activations import gate_of
from moec.compiler.frontend.indexers import SelectedTokens
from moec.compiler.frontend.masks import Mask
from moec.compiler.frontend.recording import Recording, active_record
from moec.compiler.ir.experts import Gate
from moec.compiler.ir.ops import ATTENTION, EXPERTS

NAME = "moec"


def mask_hook(*_: Any, mask_function: Any, **__: Any) -> Mask:
    """Mask implementation: return the mask function itself, which transformers hands on to the attention function."""
    return Mask(mask_function, active_record().max_length)


def attention_hook(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: SelectedTokens | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention implementation: one `moec::attention` node per layer.

    Args:
        module: The attention module. The state is that of the layer whose keys these are, else of its `layer_idx`.
        query: [B, Hq, S, D].
        key: [B, Hkv, S, D], the new tokens alone.
        value: [B, Hkv, S, Dv].
        attention_mask: The Mask from `mask_hook`.
        scaling: Factor on the logits, 1 / sqrt(D) if None.
        dropout: Unused at inference.
        softcap: See `moec::attention`.
        s_aux: Attention sinks, [Hq].
        position_bias: Must be None.
        indices: The visible tokens that an indexer selected; None for all.

    Returns:
        Output [B, S, Hq, Dv], and None in place of the attention weights.

    Raises:
        UnsupportedModelError: The mask is not from transformers or not of a known pattern, a position bias is given, or
            the keys are not in the cache.
    """
    record = active_record()
    where = record.name(module)
    record.attentions.append(where)
    if not isinstance(attention_mask, Mask):
        raise UnsupportedModelError(
            f"{where}: its attention mask does not come from the mask functions of transformers",
            hint="a family that builds its own mask needs an adapter",
        )
    if position_bias is not None:
        raise UnsupportedModelError(f"{where}: attention with a position bias is not supported")
    layer = _layer_of(record, module, key)
    if record.past is None:
        _note_cache(record, layer, key, value)
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    pattern = attention_mask.pattern()
    out, present_key, present_value = ATTENTION(
        query,
        key,
        value,
        record.past[layer, "key"],
        record.past[layer, "value"],
        record.cache_position,
        record.attention_mask,
        s_aux,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        pattern.kind,
        pattern.window,
        float(softcap or 0.0),
        None if indices is None else indices.mask,
    )
    record.present.setdefault((layer, "key"), present_key)
    record.present.setdefault((layer, "value"), present_value)
    return out, None


def _note_cache(record: Recording, layer: int, key: Tensor, value: Tensor) -> None:
    """Enter the KV cache of a layer into the state table."""
    for kind, state in (("key", key), ("value", value)):
        shape = ("batch", int(state.shape[1]), "past_sequence", int(state.shape[3]))
        record.states.setdefault((layer, kind), (shape, state.dtype))


def _layer_of(record: Recording, module: nn.Module, key: Tensor) -> int:
    """The layer whose cache `key` was appended to. Layers that share keys use the cache of the first of them."""
    for layer, (fresh, _) in record.fresh.items():
        if fresh is key:
            return layer
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or index not in record.fresh:
        raise UnsupportedModelError(
            f"{record.name(module)}: its keys are not in the cache that moec handed to it",
            hint="a family that bypasses the cache of transformers needs an adapter",
        )
    return index


def experts_hook(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts implementation: one `moec::experts` node per layer, from the flags that transformers sets on the class.

    Args:
        module: The experts module.
        hidden_states: [T, H].
        top_k_index: [T, k].
        top_k_weights: [T, k].

    Returns:
        [T, H].

    Raises:
        UnsupportedModelError: Its experts compute something that `moec::experts` cannot express.
    """
    record = active_record()
    where = record.name(module)
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(f"{where}: experts with a norm of their own after down_proj are not supported")
    first = "gate_up_proj" if module.has_gate else "up_proj"
    gate = gate_of(module, where)
    return emit_experts(
        record,
        where,
        hidden_states,
        top_k_index,
        top_k_weights,
        gate,
        getattr(module, first),
        module.down_proj,
        gate_up_bias=getattr(module, f"{first}_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        transposed=bool(module.is_transposed),
    )


def emit_experts(
    record: Recording,
    where: str,
    hidden_states: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Gate,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Call `moec::experts` and record the call; adapters use this too.

    Args:
        record: The recording of the trace.
        where: Path of the experts module.
        hidden_states: [T, H].
        indices: [T, k].
        weights: [T, k].
        gate: Activation of the experts.
        gate_up_proj: [E, 2I, H], or [E, I, H] without gate; the last two axes swapped where `transposed`.
        down_proj: [E, H, I]; the last two axes swapped where `transposed`.
        gate_up_bias: [E, 2I] or [E, I], or None.
        down_bias: [E, H] or None.
        transposed: Whether the projections are stored [in, out].

    Returns:
        [T, H].
    """
    record.experts.append(where)
    out: Tensor = EXPERTS(
        hidden_states,
        indices,
        weights.to(hidden_states.dtype),
        gate_up_proj,
        gate_up_bias,
        down_proj,
        down_bias,
        gate.activation,
        gate.gated,
        gate.interleaved,
        transposed,
        gate.alpha,
        gate.limit,
        gate.up_offset,
        gate.limit_activated,
    )
    return out


def register() -> None:
    """Register the hooks with transformers; calling this again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_hook)
    AttentionInterface.register(NAME, attention_hook)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask_hook)
