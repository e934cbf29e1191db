"""Writes OLMoE checkpoints as GGUF files without a vocabulary, with the names of llama.cpp's own converter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Coded = Callable[[str, torch.Tensor], tuple[Any, Any]]
"""Name of a tensor in the file, and its values -> the array that is stored, and its type; None: that of the array."""


def is_float(name: str, values: torch.Tensor) -> bool:
    """Whether llama.cpp wants a tensor in float32: a vector or a router."""
    return values.ndim == 1 or "ffn_gate_inp" in name


def write_olmoe(checkpoint: Path, file: Path, coded: Coded) -> None:
    """Write a checkpoint of one safetensors file as GGUF."""
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "olmoe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, values: torch.Tensor) -> None:
        data, kind = coded(name, values)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        for name, other in NAMES.items():
            add(other, tensors.get_tensor(f"{name}.weight"))
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            for name, other in LAYER_NAMES.items():
                add(f"blk.{layer}.{other}", tensors.get_tensor(f"{prefix}.{name}.weight"))
            for name in ("gate", "up", "down"):
                each = [f"{prefix}.mlp.experts.{index}.{name}_proj.weight" for index in range(config["num_experts"])]
                add(f"blk.{layer}.ffn_{name}_exps", torch.stack([tensors.get_tensor(one) for one in each]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
