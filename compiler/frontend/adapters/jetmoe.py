"""JetMoE: lists of expert matrices in the MLP, and in attention, where experts project queries and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.frontend.activations import activation_name
from moec.compiler.frontend.hooks import attention_hook, emit_experts
from moec.compiler.frontend.recording import active_record
from moec.compiler.ir.experts import Gate


def _route(router: Any, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Route tokens: [T, H] -> expert indices [T, k] and weights [T, k]."""
    values, indices = router.layer(flat).float().topk(router.top_k, dim=1)
    return indices, torch.softmax(values, dim=1).type_as(flat)


def _mlp(self: Any, layer_input: Tensor) -> Tensor:
    """Forward of `JetMoeMoE`: [B, S, H] -> [B, S, H]."""
    record = active_record()
    flat = layer_input.reshape(-1, self.input_size)
    indices, weights = _route(self.router, flat)
    gate = Gate(activation_name(self.activation, record.name(self)))
    experts = (self.input_linear.weight, self.output_linear.weight)
    out = emit_experts(record, record.name(self), flat, indices, weights, gate, *experts).view(layer_input.shape)
    bias: Tensor = self.bias
    return out + bias


def _attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_embeddings: Any = None,
    cache: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None, None]:
    """Forward of `JetMoeAttention`: [B, S, H] -> [B, S, H].

    An expert of attention is a projection of the queries and one of the attention outputs. The projections of all
    experts are computed in one matrix product, and those that a token chose are selected, so routing policies do not
    apply to them.
    """
    from transformers.models.jetmoe.modeling_jetmoe import apply_rotary_pos_emb

    experts, shape = self.experts, hidden_states.shape[:-1]
    count, width, heads = experts.num_experts, self.kv_projection_size, self.num_key_value_heads
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    indices, weights = _route(experts.router, flat)
    chosen = (indices.unsqueeze(-1) == torch.arange(count)).to(flat.dtype)  # [T, k, E]
    queries = F.linear(flat, experts.input_linear.weight.reshape(count * width, -1)).view(-1, count, width)
    # [T, k, heads * D]: every slot has a query for each key head, and shares the keys with the other slots.
    query = (chosen @ queries).view(*shape, self.top_k, heads, self.head_dim).transpose(2, 3).flatten(2, 3)
    key, value = (part.view(*shape, heads, self.head_dim) for part in self.kv_proj(hidden_states).chunk(2, dim=-1))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    past = past_key_values if cache is None else cache  # `cache` since transformers 5.24
    if past is not None:
        key, value = past.update(key, value, self.layer_idx)
    out, _ = attention_hook(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
    slots = out.view(*shape, heads, self.top_k, self.head_dim).transpose(2, 3).reshape(-1, self.top_k, width)
    by_expert = (chosen * weights.unsqueeze(-1)).transpose(1, 2) @ slots  # [T, E, heads * D]
    projection = experts.output_linear.weight.permute(1, 0, 2).reshape(-1, count * width)
    projected = F.linear(by_expert.reshape(-1, count * width), projection)
    return projected.view(hidden_states.shape) + experts.bias, None, None


JETMOE_MLP = ("JetMoeMoE", _mlp)
JETMOE_ATTENTION = ("JetMoeAttention", _attention)
