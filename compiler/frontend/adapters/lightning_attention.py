"""Lightning attention (arXiv 2401.04658), as in MiniMax-01: linear attention with a constant decay rate per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.frontend.recording import active_record
from moec.compiler.frontend.scans import emit_scan


def _fits(module: nn.Module) -> bool:
    """Whether `module` has the decay rates and the chunk factors that are derived from them."""
    return {"slope_rate", "query_decay", "key_decay", "diagonal_decay"} <= module._buffers.keys()


def _forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """[B, S, H] -> [B, S, H]; queries, keys and values have the same number of heads, and there is no scale."""
    shape, heads, width = hidden_states.shape[:-1], self.num_attention_heads, self.head_dim
    mixed = self.act_fn(self.qkv_proj(hidden_states)).reshape(*shape, heads, 3 * width)
    query, key, value = mixed.float().split(width, dim=-1)
    mask = active_record().token_mask(value)[:, :, None]
    decay = -self.slope_rate.float().reshape(heads).expand(*shape, heads) * mask
    out, _state = emit_scan(query, key, value * mask[..., None], decay, None, 1.0, delta=False)
    normed = self.norm(out.reshape(*shape, heads * width).to(hidden_states.dtype))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * normed), None


def recompute_chunk_factors(model: nn.Module) -> None:
    """Compute the chunk factors of a loaded model anew from its decay rates.

    Rates and factors are buffers of the checkpoint, in half precision each rounded by itself. Transformers uses the
    factors for a prompt and the rates for the tokens after it, and so differs between the two by 6e-4 of the largest
    logit.
    """
    for module in model.modules():
        if _fits(module):
            own: Any = module
            own.query_decay, own.key_decay, own.diagonal_decay = own.decay_factors(own.slope_rate)


LIGHTNING_ATTENTION = (_fits, _forward)
