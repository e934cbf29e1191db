"""What moec reads from the JSON files beside a model's weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.common.errors import ArtifactError, UsageError, first_line
from moec.compiler.common.files import read_json

_CONTEXT = ("max_position_embeddings", "max_seq_len", "n_positions")
LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
"""Keys of config.json that hold the number of layers."""
_LAYER_LISTS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
"""Keys with an entry for each layer."""
DEFAULT_CONTEXT = 4096
"""Context length in tokens that is assumed where config.json states none."""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of an artifact, or an empty one where the file does not exist.

    Raises:
        ArtifactError: The file does not hold a JSON object.
    """
    return read_json(path, ArtifactError, hint="export it again") if path.is_file() else {}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def context_length(config: Mapping[str, Any]) -> int | None:
    """The context length of the model in tokens, or None if config.json does not state it."""
    inner = text_config(config)
    return next((int(inner[name]) for name in _CONTEXT if isinstance(inner.get(name), int)), None)


def layer_count(config: Mapping[str, Any]) -> int:
    """Number of layers, or 0 if config.json does not state it. Nemotron-H only lists their types."""
    inner = text_config(config)
    numbers = (inner[name] for name in LAYER_KEYS if isinstance(inner.get(name), int))
    lengths = (len(inner[name]) for name in _LAYER_LISTS if isinstance(inner.get(name), (list, str)))
    return next(numbers, next(lengths, 0))


def cache_length(config: Mapping[str, Any], wanted: int | None, default: int) -> int:
    """Length in tokens of a KV cache of fixed size.

    Args:
        config: config.json.
        wanted: The value of `--context`, if one was given.
        default: Length without `--context`, unless the context of the model is shorter.

    Raises:
        UsageError: `wanted` exceeds the context length of the model.
    """
    most = context_length(config)
    if wanted is not None and most is not None and wanted > most:
        raise UsageError(
            f"--context {wanted}: the model was made for {most} tokens", hint=f"give at most --context {most}"
        )
    return wanted or min(most or default, default)


def token_ids(name: str, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids under `name`, such as "eos_token_id", of the first config that has any."""
    for config in configs:
        value = config.get(name)
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            return tuple(value)
    return ()


def end_tokens(generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids at which generation ends, as transformers' generate has them.

    Args:
        generation: generation_config.json; if it names any id, only its ids count.
        config: config.json, read where `generation` names none; its nested text_config comes last.
    """
    return token_ids("eos_token_id", generation, config, text_config(config))


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Vocabulary size, or None if config.json does not state it."""
    size = text_config(config).get("vocab_size")
    return size if isinstance(size, int) else None


def chat_template(directory: Path) -> str | None:
    """The model's default chat template (a jinja text), from a file of its own or from tokenizer_config.json.

    Raises:
        ArtifactError: A file is damaged.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{file}: cannot be read: {first_line(error)}", hint="export it again") from error
    template = read_config(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
