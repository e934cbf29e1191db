"""Random checkpoints for benchmarks, with values or as sparse files if only names and shapes matter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "intermediate_size": 512,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 0,
}
"""Configuration of 1.004 GB in bfloat16, with 167 M active parameters per token."""


def random_checkpoint(directory: Path, **overrides: Any) -> Path:
    """Write a checkpoint of random bfloat16 values (once) and return its directory."""
    if not (directory / "model.safetensors").is_file():
        import torch
        from transformers import AutoModelForCausalLM, OlmoeConfig

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OlmoeConfig(**{**BASE, **overrides}), dtype=torch.bfloat16)
        model.save_pretrained(directory)
    return directory


def random_lfm2_checkpoint(directory: Path, tokenizer: Path) -> Path:
    """Write an LFM2-MoE checkpoint of the same widths (once): onnxruntime-genai's builder does not support OLMoE.

    Args:
        directory: Directory of the checkpoint.
        tokenizer: Directory of a tokenizer, which the builder needs too.
    """
    if not (directory / "model.safetensors").is_file():
        import torch
        from transformers import AutoModelForCausalLM, Lfm2MoeConfig

        torch.manual_seed(0)
        widths = {
            **BASE,
            "moe_intermediate_size": BASE["intermediate_size"],
            "num_dense_layers": 0,
            "layer_types": ["full_attention"] * BASE["num_hidden_layers"],
            "tie_word_embeddings": False,
        }
        model = AutoModelForCausalLM.from_config(Lfm2MoeConfig(**widths), dtype=torch.bfloat16)
        model.save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, directory / name)
    return directory


def random_hybrid_checkpoint(directory: Path) -> Path:
    """Write a Qwen3-Next checkpoint of similar widths (once): three layers of gated delta rule to one of attention."""
    if not (directory / "model.safetensors").is_file():
        import torch
        from transformers import AutoModelForCausalLM, Qwen3NextConfig

        torch.manual_seed(0)
        widths = {
            **BASE,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 16384,
            "moe_intermediate_size": BASE["intermediate_size"],
            "shared_expert_intermediate_size": BASE["intermediate_size"],
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (BASE["num_hidden_layers"] // 4),
            "tie_word_embeddings": False,
        }
        model = AutoModelForCausalLM.from_config(Qwen3NextConfig(**widths), dtype=torch.bfloat16)
        model.save_pretrained(directory)
    return directory


def hollow_checkpoint(directory: Path, **overrides: Any) -> Path:
    """Write a checkpoint whose tensors are holes in a sparse file: for capture, which reads no weight."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    config = OlmoeConfig(**{**BASE, **overrides})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    table: dict[str, Any] = {}
    offset = 0
    for name, value in model.state_dict().items():
        size = value.numel() * 2
        table[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(table).encode()
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return directory
