"""LongCat-Flash: its last experts, the zero-computation experts, return their token unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.compiler.frontend.activations import activation_name
from moec.compiler.frontend.hooks import emit_experts
from moec.compiler.frontend.recording import active_record
from moec.compiler.ir.experts import Gate


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of `LongcatFlashExperts`: [T, H], [T, k], [T, k] -> [T, H].

    A slot of a zero-computation expert gets weight 0, so `moec::experts` drops it. Its share of the token is added
    separately, where routing policies cannot drop it.
    """
    record = active_record()
    routed = self.num_routed_experts
    computed = top_k_index < routed
    weights = torch.where(computed, top_k_weights, 0)
    out = emit_experts(
        record,
        record.name(self),
        hidden_states,
        torch.where(computed, top_k_index, 0),
        weights,
        Gate(activation_name(self.act_fn, record.name(self))),
        self.gate_up_proj[:routed],
        self.down_proj,
    )
    passed = torch.where(computed, 0, top_k_weights).sum(dim=-1, keepdim=True)
    return out + hidden_states * passed.to(hidden_states.dtype)


LONGCAT_EXPERTS = ("LongcatFlashExperts", _forward)
