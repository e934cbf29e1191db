"""Write an OLMoE checkpoint as a GGUF file with the writer of the package gguf, and let llama.cpp quantize it.

python write_gguf.py CHECKPOINT OUTPUT EXPERTS_USED [FTYPE]

EXPERTS_USED is that of the checkpoint in a right file. FTYPE is a number of llama.cpp's llama_ftype: 2 is Q4_0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file


def write(checkpoint: Path, output: Path, experts_used: int) -> None:
    """The names, stacks and keys that llama.cpp's own converter gives to this family."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(output, "olmoe")
    writer.add_name("tiny")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(experts_used)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMOE, config["num_hidden_layers"])
    stacks: dict[str, list[np.ndarray]] = {}
    for name, values in sorted(load_file(checkpoint / "model.safetensors").items(), key=lambda item: natural(item[0])):
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            stacks.setdefault(f"{before}.experts.{after.split('.', 1)[1]}", []).append(values)
        else:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.astype(np.float32))
    for name, experts in stacks.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.stack(experts).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def natural(name: str) -> list[tuple[int, str]]:
    """Expert 10 comes after expert 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def quantize(path: Path, ftype: int) -> None:
    """Let llama.cpp quantize the file in place."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = ftype, 1
    target = path.with_suffix(".quantized")
    if llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), parameters):
        raise SystemExit("llama.cpp cannot quantize it")
    target.replace(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    if len(sys.argv) > 4:
        quantize(Path(sys.argv[2]), int(sys.argv[4]))
