"""Writes `genai_config.json`, which describes the model to onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moec.compiler.common.model_config import (
    DEFAULT_CONTEXT,
    context_length,
    end_tokens,
    read_config,
    text_config,
    token_ids,
)
from moec.compiler.ir.program import ATTENTION, CACHE_KINDS, Program, StateSpec
from moec.compiler.text.sampling import Sampling, sampling_of
from moec.targets.onnx.lowerings.group_query import cache_width, heads_of, with_equal_caches

CONFIG = "genai_config.json"
GENERATION = "generation_config.json"


def genai_config(program: Program, filename: str, provider: str = "") -> dict[str, Any]:
    """The contents of `genai_config.json` that follow from `program`; `complete` adds special tokens and sampling.

    Args:
        program: The lowered Program, whose KV caches have the same shape in every layer.
        filename: Name of the ONNX file.
        provider: Execution provider; empty for the CPU.
    """
    states = [state for state in program.states if state.kind == "key"]
    query = program.nodes(ATTENTION)[0].args[0]
    hidden = program.layers[0].hidden_size
    return {
        "model": {
            "context_length": context_length(program.config) or DEFAULT_CONTEXT,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [{provider: {}}] if provider else [],
                },
                "filename": filename,
                "head_size": cache_width(program),
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
            # The model type of onnxruntime-genai that assumes only these inputs and outputs.
            "type": "decoder",
            "vocab_size": program.vocab_size,
        },
    }


def with_genai_states(program: Program) -> Program:
    """`program` with caches of one shape, and with the names by which onnxruntime-genai finds states of other kinds."""

    def named(state: StateSpec) -> StateSpec:
        if state.kind in CACHE_KINDS:
            return state
        past, present = (f"{end}.{state.layer}.{state.kind}_state" for end in ("past_key_values", "present"))
        return replace(state, input=replace(state.input, name=past), output=replace(state.output, name=present))

    return with_equal_caches(program.replace(states=tuple(map(named, program.states))))


def complete(directory: Path) -> None:
    """Add the start, end and padding tokens and the sampling settings of the model's own configs.

    Args:
        directory: Holds the file of `write`, config.json and, if the model has one, generation_config.json.

    Raises:
        ArtifactError: One of these files is damaged.
    """
    config, generation = (read_config(directory / name) for name in ("config.json", GENERATION))
    described = read_config(directory / CONFIG)
    described["model"] |= _tokens(config, generation)
    described["search"] = _search(
        sampling_of(generation, {}, where=str(directory / GENERATION)), described["model"]["context_length"]
    )
    _save(directory, described)


def _tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    end = end_tokens(generation, config)
    found: dict[str, Any] = {}
    if start := token_ids("bos_token_id", generation, config, text_config(config)):
        found["bos_token_id"] = start[0]
    if end:
        found["eos_token_id"] = end[0] if len(end) == 1 else list(end)
    padding = token_ids("pad_token_id", generation, config, text_config(config)) or end or (0,)
    return {**found, "pad_token_id": padding[0]}


def _search(sampling: Sampling, length: int) -> dict[str, Any]:
    drawn = sampling.temperature > 0
    return {
        "do_sample": drawn,
        "max_length": length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": sampling.repetition_penalty,
        "temperature": sampling.temperature if drawn else 1.0,
        # To onnxruntime-genai, a top_k of 0 means all tokens.
        "top_k": sampling.top_k if drawn else 1,
        "top_p": sampling.top_p,
    }


def write(program: Program, filename: str, directory: Path, provider: str = "") -> None:
    """Write `genai_config.json` into `directory`; see `genai_config`."""
    _save(directory, genai_config(program, filename, provider))


def _save(directory: Path, described: Mapping[str, Any]) -> None:
    text = json.dumps(described, indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
