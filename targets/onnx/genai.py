"""`genai_config.json`: how onnxruntime-genai is told what the model is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.program import ATTENTION, Program
from moec.targets.onnx.lowerings.group_query import heads_of, width_of

CONFIG = "genai_config.json"
DEFAULT_LENGTH = 4096
"""Context where config.json names none."""


def genai_config(program: Program, filename: str) -> dict[str, Any]:
    """The description of `program` in the file called `filename`, greedy by default.

    Args:
        program: As lowered, with a cache of one shape in every layer.
        filename: Name of the ONNX file.
    """
    config: Mapping[str, Any] = {**program.config, **program.config.get("text_config", {})}
    states = [state for state in program.states if state.kind == "key"]
    length = int(config.get("max_position_embeddings") or config.get("max_seq_len") or DEFAULT_LENGTH)
    query = program.nodes(ATTENTION)[0].args[0]
    hidden = program.layers[0].hidden_size
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
    end = tokens.get("eos_token_id", 0)
    pad = config.get("pad_token_id")
    tokens["pad_token_id"] = pad if pad is not None else end[0] if isinstance(end, list) else end
    return {
        "model": {
            **tokens,
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": width_of(states[0]),
                "hidden_size": hidden,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": int(query.meta["val"].shape[1]),  # type: ignore[union-attr]
                "num_hidden_layers": len(states),
                "num_key_value_heads": heads_of(states[0]),
            },
            # The kind of onnxruntime-genai that assumes nothing but these inputs and outputs.
            "type": "decoder",
            "vocab_size": program.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def write(program: Program, filename: str, directory: Path) -> None:
    """Write the description beside the model."""
    text = json.dumps(genai_config(program, filename), indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
