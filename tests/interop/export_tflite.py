"""Convert a checkpoint with litert-torch: signatures `prefill_16` and `decode`, and caches of 64 tokens.

python export_tflite.py CHECKPOINT OUTPUT [int8]      int8: weights in int8 by ai-edge-quantizer
"""

from __future__ import annotations

import sys
from typing import Any

import litert_torch
import torch
from litert_torch.generative.custom_ops import dynamic_update_slice as update
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

PREFILL, LENGTH = 16, 64


class Buffers(Cache):
    """Caches of fixed length, into which a step writes at its position."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], positions: torch.Tensor) -> None:
        self.keys, self.values, self.positions, self.layers = keys, values, positions, []

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        zero = torch.zeros((), dtype=torch.int32)
        start = [zero, zero, self.positions[0].to(torch.int32), zero]
        self.keys[layer] = update.dynamic_update_slice(self.keys[layer], key, start)
        self.values[layer] = update.dynamic_update_slice(self.values[layer], value, start)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return LENGTH, 0

    def __len__(self) -> int:
        return len(self.keys)


class Step(nn.Module):
    """One step with caches as inputs and outputs."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model, self.count = model, layers

    def forward(self, tokens: Any, input_pos: Any, mask: Any, **caches: Any) -> dict[str, torch.Tensor]:
        keys, values = ([caches[f"kv_cache_{kind}_{n}"] for n in range(self.count)] for kind in "kv")
        held = Buffers(keys, values, input_pos)
        positions = input_pos.unsqueeze(0)
        out = self.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=held, use_cache=True
        )
        found = {f"kv_cache_k_{n}": held.keys[n] for n in range(self.count)}
        return found | {f"kv_cache_v_{n}": held.values[n] for n in range(self.count)} | {"logits": out.logits}


def sample(config: Any, tokens: int, start: int) -> dict[str, torch.Tensor]:
    """Inputs of a step of `tokens` tokens."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = torch.arange(start, start + tokens, dtype=torch.int32)
    mask = torch.where(torch.arange(LENGTH)[None, :] <= positions[:, None], 0.0, -1e9)[None, None].float()
    shape = (1, config.num_key_value_heads, LENGTH, width)
    caches = {f"kv_cache_{kind}_{n}": torch.zeros(shape) for n in range(config.num_hidden_layers) for kind in "kv"}
    return {"tokens": torch.ones((1, tokens), dtype=torch.int32), "input_pos": positions, "mask": mask, **caches}


def main(checkpoint: str, output: str, *quantize: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    model.set_experts_implementation("batched_mm")
    step = Step(model, model.config.num_hidden_layers)
    converter = litert_torch.signature(f"prefill_{PREFILL}", step, sample_kwargs=sample(model.config, PREFILL, 0))
    converter = converter.signature("decode", step, sample_kwargs=sample(model.config, 1, PREFILL))
    converter.convert(strict_export=False).export(output)
    if quantize:
        from ai_edge_quantizer import quantizer, recipe

        own = quantizer.Quantizer(output)
        own.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        own.quantize().export_model(output, overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
