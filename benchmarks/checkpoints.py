"""Random checkpoints for benchmarks, with values or as sparse files if only names and shapes matter."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
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


HYBRID: dict[str, Any] = {
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
"""Configuration of similar widths with three layers of the gated delta rule to one of attention."""


def random_hybrid_checkpoint(directory: Path) -> Path:
    """Write a Qwen3-Next checkpoint of similar widths (once)."""
    if not (directory / "model.safetensors").is_file():
        import torch
        from transformers import AutoModelForCausalLM, Qwen3NextConfig

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3NextConfig(**HYBRID), dtype=torch.bfloat16)
        model.save_pretrained(directory)
    return directory


def random_qwen3_5_checkpoint(directory: Path, tokenizer: Path) -> Path:
    """Write a Qwen3.5-MoE checkpoint of the same widths (once): onnxruntime-genai's builder does not take Qwen3-Next.

    Args:
        directory: Directory of the checkpoint.
        tokenizer: Directory of a tokenizer, which the builder needs too.
    """
    if not (directory / "model.safetensors").is_file():
        import torch
        from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

        torch.manual_seed(0)
        # A quarter of each head is rotated, and the 16 frequencies of it are shared by time, height and width.
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [6, 5, 5]}
        text = {**HYBRID, "rope_parameters": {**rope, "mrope_interleaved": True}}
        vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
        vision |= {"out_hidden_size": HYBRID["hidden_size"], "num_position_embeddings": 64}
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {name: HYBRID["vocab_size"] - 1 - index for index, name in enumerate(names)}
        config = Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
        model = Qwen3_5MoeForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, directory / name)
    return directory


LARGE: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "intermediate_size": 1024,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
}
"""The shape of OLMoE-1B-7B: 13.8 GB in bfloat16, of which a layer takes 0.84 GB and the embedding 0.21 GB."""


def repeated_checkpoint(directory: Path, **overrides: Any) -> Path:
    """Write a random OLMoE checkpoint whose layers share the bytes of one layer in the file (once).

    Names and shapes are those of `LARGE`, so it is read like 13.8 GB, and takes 1.3 GB of disk. The experts of a layer
    differ.
    """
    return _written(directory, overrides, lambda name: re.sub(r"layers\.\d+", "layers", name))


def large_checkpoint(directory: Path, **overrides: Any) -> Path:
    """Write a random OLMoE checkpoint of the widths of `LARGE` (once), one tensor after another."""
    return _written(directory, overrides, lambda name: name)


def _written(directory: Path, overrides: Mapping[str, Any], stored_as: Callable[[str], str]) -> Path:
    """Write a random checkpoint of the widths of `LARGE`; tensors whose names map to the same one share its bytes."""
    if (directory / "model.safetensors").is_file():
        return directory
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    config = OlmoeConfig(**{**LARGE, **overrides})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    shapes, end = dict(_per_expert(model.state_dict())), 0
    places, table = dict[str, list[int]](), dict[str, Any]()
    for name, shape in shapes.items():
        if (stored := stored_as(name)) not in places:
            places[stored] = [end, end := end + 2 * math.prod(shape)]
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": places[stored]}
    random, header = torch.Generator().manual_seed(0), json.dumps(table).encode()
    partial = directory / "model.partial"
    with partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            if places.pop(stored_as(name), None):
                values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=random).mul_(0.02)
                file.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)
    partial.rename(directory / "model.safetensors")
    return directory


def _per_expert(state: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the released files, where each expert has three matrices of its own."""
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            count, rows, columns = value.shape
            for expert in range(count):
                for part in ("gate", "up"):
                    yield name.replace("gate_up_proj", f"{expert}.{part}_proj.weight"), (rows // 2, columns)
        elif name.endswith("experts.down_proj"):
            for expert in range(len(value)):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), tuple(value.shape[1:])
        else:
            yield name, tuple(value.shape)


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
