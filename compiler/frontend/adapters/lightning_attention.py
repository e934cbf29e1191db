"""Lightning attention (arXiv 2401.04658): linear attention whose heads each decay at a constant rate; MiniMax-01."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.frontend.recording import active_record
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


def settle_rates(model: nn.Module) -> None:
    """Make the factors for chunks of the rates again, in a model that is loaded.

    All of them are buffers of the checkpoint. In one of half precision each was rounded by itself, so that a prompt in
    transformers decays otherwise than the tokens after it, which go by the rates alone: by 6e-4 of the largest logit.
    """
    for module in model.modules():
        if _fits(module):
            own: Any = module
            own.query_decay, own.key_decay, own.diagonal_decay = own.decay_factors(own.slope_rate)


LIGHTNING_ATTENTION = (_fits, _forward)
