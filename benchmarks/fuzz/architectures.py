"""Random tiny architectures: a family or a released model, with odd sizes and other values of its flags."""

from __future__ import annotations

import copy
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moec.compiler.common.progress_bars import no_progress_bars
from moec.compiler.families.released_models import released_config, released_names
from moec.compiler.families.tiny_models import (
    character_tokenizer,
    expert_count,
    family_names,
    randomise,
    tiny_config,
)

DTYPES = ("float32", "bfloat16", "float16")
FAMILY_SHARE = 0.6
"""Share of the architectures that start from a family; the others start from the config.json of a release."""
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k")
HEADS = ((4, 2), (4, 4), (4, 1), (6, 2), (6, 3), (3, 3), (3, 1), (2, 1), (8, 2))
WIDTHS = (17, 24, 31, 32, 40, 48, 56, 64, 96)
"""Widths of experts and dense layers: odd ones, and those that blocks of 32 divide."""
VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "gelu", "gelu_pytorch_tanh", "relu"),
    "vocab_size": (97, 128, 131, 200, 256),
    "sliding_window": (3, 5, 12, 13, 29),
    "max_position_embeddings": (64, 100, 512),
    "rms_norm_eps": (1e-6, 1e-5, 1e-3),
    "final_logit_softcapping": (4.0, 30.0),
    "routed_scaling_factor": (0.5, 1.0, 1.5, 2.5),
    "num_hidden_layers": (1, 2, 3, 4),
    "attention_chunk_size": (5, 16),
    "index_topk": (5, 16, 40),
    "partial_rotary_factor": (0.25, 0.5, 1.0),
}
"""Key -> values that may take the place of its own, wherever a model has the key."""
ROTARY: tuple[Mapping[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
SETTINGS_OF_A_RUN = frozenset({"use_cache", "return_dict", "is_encoder_decoder", "output_router_logits", "is_moe"})
"""Flags that say how a model is run, or what kind of model it is."""


@dataclass(frozen=True)
class Architecture:
    """A tiny model, which `write` makes.

    Attributes:
        base: "family NAME" or "released NAME".
        changes: Keys of its (text) config and their values, where they differ from the base.
        dtype: dtype in which the checkpoint is stored.
        seed: Seed of the weights.
    """

    base: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0

    @property
    def kind(self) -> str:
        """Either `family` or `released`."""
        return self.base.partition(" ")[0]

    @property
    def name(self) -> str:
        """Name of the family or of the release."""
        return self.base.partition(" ")[2]

    def raw(self) -> dict[str, Any]:
        """config.json with the changes."""
        config = _plain(self.base)
        text = inner(config)
        text.update(copy.deepcopy(dict(self.changes)))
        return config


@cache
def _base(base: str) -> str:
    kind, _, name = base.partition(" ")
    if kind == "family":
        return json.dumps(tiny_config(name).to_dict(), default=str)
    return json.dumps({key: value for key, value in released_config(name).items() if key != "quantization_config"})


def _plain(base: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_base(base))
    return found


def inner(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the text model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def draw(chance: random.Random) -> Architecture:
    """A random architecture; whether transformers takes it shows when it is written."""
    families = [name for name in family_names() if name not in ENCODER_DECODERS]
    if chance.random() < FAMILY_SHARE:
        base = f"family {chance.choice(families)}"
    else:
        base = f"released {chance.choice(released_names())}"
    changes: dict[str, Any] = {}
    config = inner(_plain(base))
    for change in (_experts, _heads, _widths, _layers, _flags, _values, _rotary):
        if chance.random() < 0.6:
            changes |= change({**config, **changes}, chance)
    changes = {key: value for key, value in changes.items() if config.get(key) != value}
    return Architecture(base, changes, chance.choice(DTYPES), chance.randrange(1000))


ENCODER_DECODERS = frozenset({"nllb_moe", "switch_transformers"})
"""Families that moec refuses as a whole, each time with the same message."""


def _key(config: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if isinstance(config.get(name), int)), "")


def _experts(config: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Other numbers of experts and of slots, with groups that divide them."""
    experts, slots = _key(config, EXPERTS), _key(config, TOP_K)
    if not experts or not slots:
        return {}
    groups, kept = config.get("n_group") or 1, config.get("topk_group") or 1
    if groups > 1:
        each = chance.choice((2, 3, 4))
        return {experts: groups * each, slots: chance.randint(1, min(4, kept * each))}
    count = chance.choice((1, 2, 3, 4, 5, 6, 7, 9, 12, 16))
    return {experts: count, slots: chance.randint(1, min(4, count))}


def _heads(config: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Other numbers and widths of heads, and a hidden size that they divide."""
    found: dict[str, Any] = {}
    if not isinstance(config.get("num_attention_heads"), int):
        return found
    heads, shared = chance.choice(HEADS)
    if "kv_lora_rank" in config:
        shared = heads
        sizes: dict[str, tuple[int, ...]] = {
            "qk_nope_head_dim": (8, 10, 16),
            "qk_rope_head_dim": (4, 8, 12),
            "v_head_dim": (8, 12, 20),
        }
        sizes |= {"kv_lora_rank": (20, 24, 33), "q_lora_rank": (20, 32)}
        found |= {key: chance.choice(options) for key, options in sizes.items() if config.get(key)}
        if config.get("head_dim") == config.get("qk_rope_head_dim"):
            found["head_dim"] = found.get("qk_rope_head_dim", config.get("head_dim"))
    else:
        if config.get("head_dim"):
            found["head_dim"] = chance.choice((8, 12, 16, 20))
        found["hidden_size"] = heads * chance.choice((8, 10, 12, 16, 24))
    return {**found, "num_attention_heads": heads, "num_key_value_heads": shared}


def _widths(config: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Other widths of experts and dense layers."""
    keys = [key for key, value in config.items() if key.endswith(("intermediate_size", "ffn_dim")) and value]
    return {key: chance.choice(WIDTHS) for key in keys if chance.random() < 0.7}


def _layers(config: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Another number of layers, or the same kinds of layers in another order."""
    count = config.get("num_hidden_layers")
    lists = [key for key, value in config.items() if isinstance(value, list) and len(value) == count and count]
    if not lists:
        return {}
    size = chance.choice((1, 2, 3, 4))
    places = [chance.randrange(count) for _ in range(size)]
    return {"num_hidden_layers": size} | {key: [config[key][place] for place in places] for key in lists}


def _flags(config: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Some flags the other way round, and some scalars as another release of the same type has them."""
    known = _values_of_releases().get(str(config.get("model_type")), {})
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in SETTINGS_OF_A_RUN or key.startswith(("_", "output_")) or chance.random() > 0.2:
            continue
        if isinstance(value, bool):
            found[key] = not value
        elif key in known:
            found[key] = json.loads(chance.choice(known[key]))
    return found


def _values(config: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Other values of keys that many models have."""
    listed = any(isinstance(value, list) and len(value) == config.get("num_hidden_layers") for value in config.values())
    keys = [key for key in VALUES if config.get(key) is not None and not (listed and key == "num_hidden_layers")]
    return {key: chance.choice(VALUES[key]) for key in keys if chance.random() < 0.3}


def _rotary(config: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Another scaling of the rotary frequencies."""
    rotary = config.get("rope_parameters")
    if not isinstance(rotary, dict) or "rope_type" not in rotary or chance.random() < 0.5:
        return {}
    kept = {key: rotary[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_section") if key in rotary}
    return {"rope_parameters": {**kept, **chance.choice(ROTARY)}}


@cache
def _values_of_releases() -> dict[str, dict[str, list[str]]]:
    """Model type -> key -> the values in JSON that released configurations and families have, if there are several."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    names = [f"released {name}" for name in released_names()]
    for config in (inner(_plain(name)) for name in names):
        for key, value in _scalars(config):
            found[str(config.get("model_type"))][key].add(json.dumps(value))
    return {
        kind: {key: sorted(values) for key, values in keys.items() if len(values) > 1} for kind, keys in found.items()
    }


def _scalars(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flags and names; sizes are drawn elsewhere, where they fit each other."""
    for key, value in config.items():
        if isinstance(value, bool | str) and not key.startswith(("model_type", "torch_dtype", "dtype", "transformers")):
            yield key, value


def write(architecture: Architecture, directory: Path) -> None:
    """Write config.json, model.safetensors and tokenizer.json.

    Raises:
        Exception: transformers does not take the config, or the model gives no finite logits; any type.
    """
    from moec.compiler.frontend import architecture as classes

    directory.mkdir(parents=True)
    raw = architecture.raw()
    text = json.dumps(raw, indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")
    config = classes.read_config(directory, raw, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(architecture.seed)
        model = classes.build(config, attention="eager", dtype=torch.float32, trust_remote_code=False)
    classes.set_experts(model, "eager")
    generator = torch.Generator().manual_seed(architecture.seed)
    randomise(model, generator, expert_count(config.get_text_config()))
    _check_it_runs(model, config.get_text_config().vocab_size)
    torch.nn.Module.to(model, getattr(torch, architecture.dtype))
    with no_progress_bars():
        model.save_pretrained(directory)
    (directory / "config.json").write_text(text, encoding="utf-8")
    character_tokenizer(config.get_text_config().vocab_size).save(str(directory / "tokenizer.json"))


@torch.no_grad()
def _check_it_runs(model: Any, vocabulary: int) -> None:
    """Run two lengths in transformers, since a config may contradict itself in ways that only a forward pass shows."""
    from moec.compiler.frontend import architecture as classes

    decoder = classes.text_decoder(model.eval())
    for length in (7, 33):
        ids = torch.arange(length)[None] * 7 % vocabulary
        logits = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if not bool(logits.isfinite().all()) or float(logits.std()) == 0:
            raise ValueError("its logits are not finite, or all equal")
