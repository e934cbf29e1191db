"""The classes of transformers for a config.json, without the settings that training and fine-tuning left in it.

A class of transformers is used wherever there is one, whatever `auto_map` says. Code of the checkpoint itself runs only
where transformers has no class, and only if the user trusts it.

A multimodal release is built as its wrapper and called with text alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.common.errors import CheckpointError, MoecError, UnsupportedModelError, first_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Alias:
    """A model type that transformers has under another name.

    Attributes:
        known_as: Name of the model type in transformers.
        renamed: Key of config.json -> its name in transformers, where the two differ.
    """

    known_as: str
    renamed: Mapping[str, str] = field(default_factory=dict)


ALIASES: Mapping[str, Alias] = {
    "hunyuan": Alias("hunyuan_v1_moe", {"attention_head_dim": "head_dim"}),
    "kimi_k2": Alias("deepseek_v3"),
}
"""Model type in config.json -> the equal type of transformers. Nowhere else does moec decide by the name of a model."""

_RUN_TIME_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "attn_implementation",
        "experts_implementation",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "torchscript",
        "use_cache",
        "use_return_dict",
    }
)
"""Keys that say how a model was run when it was saved, and not what it computes."""

_BUILD_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, OSError, ArithmeticError)


def named_type(raw: Mapping[str, Any]) -> str:
    """The model type of a config.json by its name in transformers."""
    alias, name = _given_type(raw)
    return name if alias is None else alias.known_as


def _given_type(raw: Mapping[str, Any]) -> tuple[Alias | None, str]:
    """The entry of `ALIASES` for a config.json, if there is one, and the model type that the file names."""
    name = str(raw.get("model_type", ""))
    return ALIASES.get(name), name


def is_native(raw: Mapping[str, Any]) -> bool:
    """Whether transformers has the classes of this config.json itself."""
    from transformers import CONFIG_MAPPING

    return named_type(raw) in CONFIG_MAPPING


def notes(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences for the user about how the classes were chosen."""
    found = []
    if "auto_map" in raw and is_native(raw):
        found.append("config.json names code of its own (auto_map); it is not run, since transformers has the model")
    alias, name = _given_type(raw)
    if alias is not None:
        found.append(f"model_type {name} is read as {alias.known_as}, which it equals")
    return tuple(found)


def read_config(directory: Path, raw: Mapping[str, Any], *, trust_remote_code: bool) -> PreTrainedConfig:
    """The typed config of transformers.

    Args:
        directory: Of the checkpoint.
        raw: Its config.json.
        trust_remote_code: Whether code of the checkpoint may be run where transformers has no class.

    Raises:
        UnsupportedModelError: transformers does not know the model type, and no code may be run.
        CheckpointError: transformers refuses the values.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    try:
        if is_native(raw):
            plain = PreTrainedConfig._decode_special_floats(_for_inference(raw))
            config: PreTrainedConfig = CONFIG_MAPPING[named_type(raw)].from_dict(plain)
            return config
        _check_unknown(directory, raw, trust_remote_code)
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=True)
    except MoecError:
        raise
    except Exception as error:  # 400 config classes raise many types of exceptions, all of them about these values
        raise CheckpointError(
            f"{directory / 'config.json'}: transformers refuses it: {' '.join(str(error).split())}",
            hint="check model_type and the values that the message names",
        ) from error
    for key in _RUN_TIME_KEYS & vars(config).keys():
        if isinstance(getattr(config, key), bool):
            setattr(config, key, key in {"return_dict", "use_cache"})
    return config


def _check_unknown(directory: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> None:
    if "model_type" not in raw:
        raise CheckpointError(
            f"{directory / 'config.json'}: it has no model_type", hint="is it the config.json of a model?"
        )
    name = raw["model_type"]
    if "auto_map" not in raw:
        raise UnsupportedModelError(
            f"{directory}: transformers has no model of type {name!r}, and config.json names no code of its own",
            hint="check model_type in config.json; moec families lists what works",
        )
    if not trust_remote_code:
        raise UnsupportedModelError(
            f"{directory}: transformers has no model of type {name!r}; config.json names code of its own (auto_map) "
            "that would have to be run",
            hint="read that code, then pass --trust-remote-code",
        )


def _for_inference(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw`, nested configs included, without run-time keys and with the names that transformers has."""
    plain: dict[str, Any] = {}
    for key, value in raw.items():
        if key in _RUN_TIME_KEYS or key == "auto_map":
            continue
        plain[key] = _for_inference(value) if key.endswith("_config") and isinstance(value, Mapping) else value
    alias, _ = _given_type(raw)
    if alias is not None:
        plain["model_type"] = alias.known_as
        for key, known in alias.renamed.items():
            if key in plain:
                plain.setdefault(known, plain.pop(key))
    return copy.deepcopy(plain)


def model_class(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """The class that builds the model, and a copy of the config that it takes.

    The class is that of a causal language model, or of the wrapper of a multimodal release. Where transformers has a
    class for the text model of such a release, that class takes the text part of the config.

    Returns:
        A class of transformers, or `AutoModelForCausalLM` where the class is code of the checkpoint; and the config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM

    own = copy.deepcopy(config)  # building a model changes its config
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(config) in mapping:
            kind: Any = mapping[type(config)]
            return kind, own if isinstance(own, kind.config_class) else own.get_text_config()
    return AutoModelForCausalLM, own


def build(config: PreTrainedConfig, *, attention: str, dtype: Any, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model with the initial weights of transformers, on the current default device.

    Args:
        config: The config; it is not changed.
        attention: Name of the attention implementation.
        dtype: Dtype of the parameters.
        trust_remote_code: Whether the class may be code of the checkpoint.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    kind, own = model_class(config)
    options = {"attn_implementation": attention, "dtype": dtype}
    try:
        if hasattr(kind, "_from_config"):
            model: PreTrainedModel = kind._from_config(own, **options)
        else:
            model = kind.from_config(own, trust_remote_code=trust_remote_code, **options)
    except _BUILD_ERRORS as error:
        raise UnsupportedModelError(
            f"{type(config).__name__}: transformers cannot build it as a language model "
            f"with pluggable attention: {first_line(error)}",
            hint="moec compiles decoders that AutoModelForCausalLM or AutoModelForMultimodalLM knows",
        ) from error
    return model


def set_experts(model: PreTrainedModel, implementation: str) -> None:
    """Set the experts implementation of `model` and of every model inside it, since a wrapper may not pass it on."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation(implementation)


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` that turns token ids into logits: itself, or the first child that can.

    A wrapper without a `forward` of its own is only a container of models.
    """
    from transformers import PreTrainedModel

    if not _has_forward(model):
        for part in model.children():
            if isinstance(part, PreTrainedModel) and _has_forward(part) and _has_head(part):
                return part
    return model


def _has_forward(model: nn.Module) -> bool:
    from torch import nn

    return type(model).forward is not nn.Module.forward


def _has_head(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings() is not None  # type: ignore[no-untyped-call]


def cache_argument(model: nn.Module) -> str:
    """Name of the argument that takes the cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
