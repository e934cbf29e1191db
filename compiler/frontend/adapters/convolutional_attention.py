"""Compressed convolutional attention (arXiv 2510.04476), as in ZAYA: queries and keys mix neighbouring tokens.

Queries and keys pass a depthwise convolution and one within each head. Half of each value comes from the token before.
The last inputs of the convolutions are a state of the kind "conv", the value of the last token is one of the kind
"recurrent".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.compiler.frontend.recording import active_record


def _fits(module: nn.Module) -> bool:
    """Whether `module` has the two convolutions and the two value projections."""
    return {"conv_qk_depthwise", "conv_qk_grouped", "v_proj_current", "v_proj_delayed"} <= module._modules.keys()


def _forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H] -> query [B, S, Hq, D], key [B, S, Hkv, D] and value [B, S, Hkv, D]."""
    shape, width, groups = hidden_states.shape[:-1], self.head_dim, self.num_key_value_groups
    query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
    mixed = _mixed(self, torch.cat([query, key], dim=-1).transpose(1, 2)).transpose(1, 2)
    query, key = (part.view(*shape, -1, width) for part in (query, key))
    query_residual = (query + key.repeat_interleave(groups, dim=2)) * 0.5
    key_residual = query_residual.view(*shape, -1, groups, width).mean(dim=-2)
    heads = mixed.reshape(*shape, -1, width)
    query, key = heads[:, :, : query_residual.shape[2]], heads[:, :, query_residual.shape[2] :]
    query, key = query + query_residual, key + key_residual
    value = torch.cat([self.v_proj_current(hidden_states), _delayed(self, hidden_states)], dim=-1)
    return query, key, value.view(*shape, -1, width)


def _mixed(self: Any, x: Tensor) -> Tensor:
    """Apply both convolutions to queries and keys [B, C, S], continuing from the state."""
    record, layer = active_record(), active_record().layer()
    kept = int(self.conv_kernel_size)
    state = record.state(layer, "conv", (int(x.shape[1]), kept), x.dtype)
    if state is None:
        return x
    joined = torch.cat([state, x * record.token_mask(x)[:, None, :]], dim=-1)
    record.present[layer, "conv"] = joined[..., -kept:]
    out: Tensor = self.conv_qk_grouped(self.conv_qk_depthwise(joined))
    return out


def _delayed(self: Any, hidden_states: Tensor) -> Tensor:
    """The half of the values [B, S, C] that comes from the token before; zeros for the first token."""
    record, layer = active_record(), active_record().layer()
    projection = self.v_proj_delayed
    own = F.linear(hidden_states, projection.weight)
    state = record.state(layer, "recurrent", (1, int(own.shape[2])), own.dtype)
    if state is None:
        return own
    joined = torch.cat([state, own * record.token_mask(own)[:, :, None]], dim=1)
    record.present[layer, "recurrent"] = joined[:, -1:]
    before = joined[:, :-1]
    return before if projection.bias is None else before + projection.bias


CONVOLUTIONAL_ATTENTION = (_fits, _forward)
