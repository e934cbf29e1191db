"""Writes OLMoE checkpoints as GGUF files without a vocabulary, with the names of llama.cpp's own converter.

Needs no torch where the checkpoint has only types that NumPy has.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Coded = Callable[[str, Any], tuple[Any, Any]]
"""Name of a tensor in the file, and its values -> the array that is stored, and its type; None: that of the array."""


def is_float(name: str, values: Any) -> bool:
    """Whether llama.cpp wants a tensor in float32: a vector or a router."""
    return values.ndim == 1 or "ffn_gate_inp" in name


def write_olmoe(
    checkpoint: Path, file: Path, coded: Coded, *, framework: str = "torch", experts_used: int | None = None
) -> None:
    """Write a checkpoint of one safetensors file as GGUF.

    Args:
        checkpoint: Directory of the checkpoint.
        file: The file to write.
        coded: See `Coded`.
        framework: "torch" or "numpy": what tensors are read as.
        experts_used: Experts per token that the file states; None: those of the checkpoint.
    """
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(file, "olmoe")
    writer.add_name("olmoe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"] if experts_used is None else experts_used)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMOE, layers)

    def add(name: str, values: Any) -> None:
        stored = names.get_name(name)
        data, kind = coded(stored, values)
        writer.add_tensor(f"{stored}.weight", data, raw_dtype=kind)

    with safe_open(checkpoint / "model.safetensors", framework) as tensors:
        for name in sorted(tensors.keys()):
            if ".experts." not in name:
                add(name.removesuffix(".weight"), tensors.get_tensor(name))
        stack = importlib.import_module(framework).stack
        for layer in range(layers):
            prefix = f"model.layers.{layer}.mlp.experts"
            for name in ("gate_proj", "up_proj", "down_proj"):
                each = [f"{prefix}.{index}.{name}.weight" for index in range(config["num_experts"])]
                add(f"{prefix}.{name}", stack([tensors.get_tensor(one) for one in each]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, output: Path, kind: int) -> None:
    """Let llama.cpp quantize a file.

    Args:
        source: A GGUF file.
        output: The file to write.
        kind: A number of llama.cpp's llama_ftype: 2 is Q4_0.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), parameters):
        raise SystemExit(f"llama.cpp cannot quantize {source}")
