"""Lightning attention (arXiv 2401.04658): linear attention whose heads each decay at a constant rate; MiniMax-01."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.frontend.hooks import active_record
from moec.compiler.frontend.scans import emit_scan


def _fits(module: nn.Module) -> bool:
    """It is found by its rates, and by the factors for chunks that it derives from them."""
    return {"slope_rate", "query_decay", "key_decay", "diagonal_decay"} <= module._buffers.keys()


def _forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """[B, S, H] -> [B, S, H]; the scan has as many keys and queries as values, and no scale."""
    shape, heads, width = hidden_states.shape[:-1], self.num_attention_heads, self.head_dim
    mixed = self.act_fn(self.qkv_proj(hidden_states)).reshape(*shape, heads, 3 * width)
    query, key, value = mixed.float().split(width, dim=-1)
    mask = active_record().token_mask(value)[:, :, None]
    decay = -self.slope_rate.float().reshape(heads).expand(*shape, heads) * mask
    out, _state = emit_scan(query, key, value * mask[..., None], decay, None, 1.0, delta=False)
    normed = self.norm(out.reshape(*shape, heads * width).to(hidden_states.dtype))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * normed), None


LIGHTNING_ATTENTION = (_fits, _forward)
