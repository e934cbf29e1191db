"""What moec reads from a model's config.json and generation_config.json. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.errors import ArtifactError

_CONTEXT = ("max_position_embeddings", "max_seq_len", "n_positions")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of an artifact, or an empty one where the file does not exist.

    Raises:
        ArtifactError: The file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}", hint="export it again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: not a JSON object", hint="export it again")
    return value


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def context_length(config: Mapping[str, Any]) -> int | None:
    """The largest number of tokens that the model was made for, or None if config.json does not say."""
    inner = text_config(config)
    return next((int(inner[name]) for name in _CONTEXT if isinstance(inner.get(name), int)), None)


def token_ids(name: str, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids under `name`, such as "eos_token_id", of the first config that has any."""
    for config in configs:
        value = config.get(name)
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(int(item) for item in value)
    return ()


def remarks(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the checkpoint was read, and what of it is not used: rows for people."""
    rows = [("note", note) for note in model.get("notes", ())]
    if left_out := model.get("left_out"):
        rows.append(("left out", ", ".join(f"{part} ({count} tensors)" for part, count in left_out.items())))
    return rows
