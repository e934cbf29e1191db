"""Step 3.7: its experts clamp the gate after the activation (`swiglu_limits`), where others clamp it before."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from moec.compiler.frontend.activations import activation_name
from moec.compiler.frontend.hooks import emit_experts
from moec.compiler.frontend.recording import active_record
from moec.compiler.ir.experts import Gate


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of `Step3p7Experts`: [T, H], [T, k], [T, k] -> [T, H]."""
    record = active_record()
    where = record.name(self)
    limited = math.isfinite(self.limit)
    gate = Gate(activation_name(self.act_fn, where), limit=self.limit if limited else 0.0, limit_activated=limited)
    experts = (self.gate_up_proj, self.down_proj)
    return emit_experts(record, where, hidden_states, top_k_index, top_k_weights, gate, *experts)


STEP3P7_EXPERTS = ("Step3p7Experts", _forward)
