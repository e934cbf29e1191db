"""DBRX: the experts are stacked along the rows of the 2-D parameters w1, v1 and w2, and eager mode loops over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.compiler.frontend.activations import activation_name
from moec.compiler.frontend.hooks import emit_experts
from moec.compiler.frontend.recording import active_record
from moec.compiler.ir.experts import Gate


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of `DbrxExperts`: [B, S, H], [B * S, k], [B * S, k] -> [B, S, H]."""
    record = active_record()
    mlp = self.mlp
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    # w1 is the gate and v1 the up projection; w2 is stored [I, H] per expert.
    gate_up = torch.cat([mlp.w1.view(shape), mlp.v1.view(shape)], dim=1)
    down = mlp.w2.view(shape).transpose(1, 2)
    gate = Gate(activation_name(mlp.activation_fn, record.name(self)))
    flat = hidden_states.reshape(-1, self.hidden_size)
    out = emit_experts(record, record.name(self), flat, top_k_index, top_k_weights, gate, gate_up, down)
    return out.view(hidden_states.shape)


DBRX_EXPERTS = ("DbrxExperts", _forward)
