"""Tiny random checkpoints of many MoE families, from the configurations in `golden_models/families.yaml`.

`moec families --check` and the tests capture them and compare them with transformers. They have every trait of the
family (window, grouped-query heads, dense first layers, biases, group-limited routing) and run in milliseconds.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import math
from typing import TYPE_CHECKING, Any

import yaml

from moec.compiler.common.errors import UsageError
from moec.compiler.common.progress_bars import no_progress_bars

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel

_EMBEDDING_STD = 0.5
_VECTOR_STD = 0.2
_SINK_STD = 1.0
_ROUTER_GAIN = 2.0


@functools.cache
def _families() -> dict[str, dict[str, Any]]:
    """The table of the data file: family name -> keyword arguments of its config class."""
    text = (importlib.resources.files("moec") / "golden_models" / "families.yaml").read_text(encoding="utf-8")
    families: dict[str, dict[str, Any]] = yaml.safe_load(text)["families"]
    return families


def family_names() -> tuple[str, ...]:
    """Names of all families with a tiny configuration, sorted."""
    return tuple(sorted(_families()))


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The transformers config of a tiny model.

    Args:
        family: One of `family_names()`.
        overrides: Keyword arguments of the config class that replace or add to those of the data file.

    Raises:
        UsageError: The family is unknown.
    """
    from transformers import AutoConfig

    if family not in _families():
        raise UsageError(f"unknown model family {family!r}", hint=f"known families: {', '.join(family_names())}")
    arguments = copy.deepcopy(_families()[family]) | overrides
    config: PreTrainedConfig = AutoConfig.for_model(arguments.pop("model_type", family), **arguments)
    return config


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model on the CPU in evaluation mode, with eager attention.

    Args:
        family: One of `family_names()`.
        seed: Seed of every weight; the global random state is not changed.
        overrides: See `tiny_config`.

    Raises:
        UsageError: The family is unknown.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = tiny_config(family, **overrides)
    auto_class: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        # Some classes initialise vectors randomly, and `randomise` adds noise to these values.
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class.from_config(config, attn_implementation="eager").float().eval()
    randomise(model, torch.Generator().manual_seed(seed), expert_count(config))
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer[-1] = -1.0  # as transformers 5.24 does whenever it loads a checkpoint
    return model


def write_tiny_checkpoint(
    family: str, directory: Path, *, seed: int = 0, dtype: str = "float32", tokenizer: bool = False, **overrides: Any
) -> Path:
    """Write config.json, generation_config.json and model.safetensors of a tiny random model.

    The tensors have the names of released checkpoints, with one tensor per expert if the family has that.

    Args:
        family: One of `family_names()`.
        directory: Destination; made if it does not exist.
        seed: Seed of every weight.
        dtype: Name of a torch floating-point dtype, such as "float16".
        tokenizer: Whether to write a tokenizer.json too, with one token per character, so that text can be used.
        overrides: See `tiny_config`.

    Returns:
        `directory`.

    Raises:
        UsageError: The family or the dtype is unknown.
    """
    import torch

    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise UsageError(f"unknown dtype {dtype!r}", hint="use float32, float16 or bfloat16")
    model = tiny_model(family, seed=seed, **overrides)
    torch.nn.Module.to(model, torch_dtype)
    model.config.dtype = torch_dtype
    with no_progress_bars():
        model.save_pretrained(directory)
    if tokenizer:
        character_tokenizer(model.config.get_text_config().vocab_size).save(str(directory / "tokenizer.json"))
    return directory


def character_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with a token for each character code below `vocab_size`; other characters are token 0."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocabulary = {chr(code): code for code in range(min(vocab_size, 256))}
    return Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=chr(0)))


def expert_count(config: PreTrainedConfig) -> int:
    """Number of routed experts, under any of the keys that families use; 0 for a dense model."""
    holders = [config, getattr(config, "ffn_config", None)]
    keys = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
    counts = [getattr(holder, key, None) for holder in holders if holder is not None for key in keys]
    return next((count for count in counts if count), 0)


def randomise(model: PreTrainedModel, generator: torch.Generator, experts: int) -> None:
    """Replace every floating-point weight by random values that are not degenerate and keep activations of order one.

    Freshly initialised models hide errors: biases and sinks are 0, norms are 1, and all experts are almost equally
    likely. Matrices get a gain of 1, router weights a gain of 2, which spreads the router logits by about 2, so that
    routing is decided. Vectors keep their initial value plus noise, because a norm weight may belong near 0 or near 1,
    depending on the family. Buffers with three axes or more are not changed: they are tables that the class derives
    from each other, such as the rates of lightning attention.

    Args:
        model: The model, changed in place.
        generator: Source of the random values.
        experts: Number of routed experts, by which router weights are recognised; 0 for a dense model.
    """
    import torch

    embeddings = {module.weight.data_ptr() for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    seen = {buffer.data_ptr() for buffer in model.buffers() if buffer.ndim > 2}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.data_ptr() in embeddings:
            tensor.copy_(noise * _EMBEDDING_STD)
        elif tensor.ndim < 2 or (experts and tuple(tensor.shape) == (1, experts)):  # a selection bias may be [1, E]
            tensor.add_(noise * (_SINK_STD if name.endswith("sinks") else _VECTOR_STD))
        else:
            gain = _ROUTER_GAIN if tensor.ndim == 2 and tensor.shape[0] == experts else 1.0
            tensor.copy_(noise * (gain / math.sqrt(tensor.shape[-1])))
