"""Tiny random checkpoints with the configurations of released models, from `golden_models/released.yaml`.

config.json is the published one with reduced sizes: keys, layer patterns, flags, windows, scaling, dtypes and wrappers
are those of the release. The tensors have the names and the dtype of the release.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moec.compiler.common.errors import UsageError
from moec.compiler.common.progress_bars import no_progress_bars
from moec.compiler.families.tiny_models import character_tokenizer, expert_count, randomise

_STORED = "quantization_config"


@functools.cache
def _released() -> dict[str, dict[str, Any]]:
    """The table of the data file: name -> source, config, and reduced sizes."""
    text = (importlib.resources.files("moec") / "golden_models" / "released.yaml").read_text(encoding="utf-8")
    data: dict[str, dict[str, dict[str, Any]]] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return data["released"]


def released_names() -> tuple[str, ...]:
    """Names of all released models in the data file, sorted."""
    return tuple(sorted(_released(), key=str.lower))


def released_config(name: str) -> dict[str, Any]:
    """config.json of a released model with reduced sizes.

    Args:
        name: One of `released_names()`.

    Raises:
        UsageError: The model is unknown.
    """
    entry = _entry(name)
    return _merged(entry["config"], entry["reduced"])


def published_config(name: str) -> tuple[dict[str, Any], str]:
    """config.json of a released model as it was published, and where it was read.

    Raises:
        UsageError: The model is unknown.
    """
    entry = _entry(name)
    return _merged(entry["config"], {}), str(entry["source"])


def _entry(name: str) -> dict[str, Any]:
    if name not in _released():
        raise UsageError(f"unknown released model {name!r}", hint=f"known: {', '.join(released_names())}")
    return _released()[name]


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` updated with `changes`, recursively for mappings."""
    result = copy.deepcopy(dict(values))
    for key, change in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            result[key] = _merged(old, change)
        else:
            result[key] = copy.deepcopy(change)
    return result


def write_released_checkpoint(name: str, directory: Path, *, seed: int = 0) -> Path:
    """Write config.json, model.safetensors and tokenizer.json of a tiny model with a released configuration.

    If the release is quantized, the weights are written in its float dtype, without a quantization_config.

    Args:
        name: One of `released_names()`.
        directory: Where to write; made if it does not exist.
        seed: Seed of every weight.

    Returns:
        `directory`.

    Raises:
        UsageError: The model is unknown.
        MoecError: transformers has no class for it, or refuses the values.
    """
    import torch

    from moec.compiler.frontend import architecture

    raw = {key: value for key, value in released_config(name).items() if key != _STORED}
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(raw, indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")
    config = architecture.read_config(directory, raw, trust_remote_code=False)
    inner = config.get_text_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture.build(config, attention="eager", dtype=torch.float32, trust_remote_code=False)
    randomise(model, torch.Generator().manual_seed(seed), expert_count(inner))
    dtype = getattr(config, "dtype", None) or getattr(inner, "dtype", None) or torch.bfloat16
    torch.nn.Module.to(model, dtype)
    with no_progress_bars():
        model.save_pretrained(directory)
    (directory / "config.json").write_text(text, encoding="utf-8")
    character_tokenizer(inner.vocab_size).save(str(directory / "tokenizer.json"))
    return directory


def write_hollow_checkpoint(name: str, directory: Path) -> Path:
    """Write a checkpoint of a released model in its real size, whose weights are a hole in a sparse file.

    Nothing that reads no weight tells it from the release: capture, `moec estimate`, `moec inspect`. If the release is
    quantized, it stands for the same model in 16 bits.

    Args:
        name: One of `released_names()`.
        directory: Where to write; made if it does not exist.

    Returns:
        `directory`.

    Raises:
        UsageError: The model is unknown.
        MoecError: transformers has no class for it, or refuses the values.
    """
    import torch

    from moec.compiler.frontend import architecture

    raw = {key: value for key, value in published_config(name)[0].items() if key != _STORED}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    config = architecture.read_config(directory, raw, trust_remote_code=False)
    with torch.device("meta"):
        model = architecture.build(config, attention="eager", dtype=torch.bfloat16, trust_remote_code=False)
    table: dict[str, Any] = {}
    offset = 0
    for key, value in model.state_dict().items():
        size = value.numel() * torch.bfloat16.itemsize
        table[key] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(table).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return directory
