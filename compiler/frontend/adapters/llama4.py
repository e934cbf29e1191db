"""Llama 4: eager mode runs every expert on every token, and the routing weight scales the input of an expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.frontend.activations import activation_name
from moec.compiler.frontend.hooks import emit_experts
from moec.compiler.frontend.recording import active_record
from moec.compiler.ir.experts import Gate


def _forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Forward of `Llama4TextMoe`: [B, S, H] -> ([B * S, H], router logits [B * S, E]).

    `moec::experts` multiplies outputs by the routing weight, not inputs. So each slot becomes a token of its own with
    the scaled input and weight 1. With top-1 routing, as in the released models, this costs nothing.
    """
    record = active_record()
    flat = hidden_states.reshape(-1, self.hidden_dim)
    logits = F.linear(flat, self.router.weight)
    values, indices = torch.topk(logits, self.top_k, dim=1)
    scores = torch.sigmoid(values.float()).to(flat.dtype)
    scaled = (flat.unsqueeze(1) * scores.unsqueeze(-1)).reshape(-1, self.hidden_dim)
    experts = self.experts
    routed = emit_experts(
        record,
        record.name(experts),
        scaled,
        indices.reshape(-1, 1),
        torch.ones_like(scores).reshape(-1, 1),
        Gate(activation_name(experts.act_fn, record.name(experts))),
        experts.gate_up_proj,
        experts.down_proj,
        transposed=True,
    )
    out = self.shared_expert(flat) + routed.reshape(-1, self.top_k, self.hidden_dim).sum(dim=1)
    return out, logits


LLAMA4_MOE = ("Llama4TextMoe", _forward)
