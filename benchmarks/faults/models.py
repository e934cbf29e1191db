"""The models that get a fault: tiny random siblings of model families, with the recipe by which they are exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from moec.compiler.families.tiny_models import write_tiny_checkpoint
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.program import Built, build
from moec.compiler.pipeline.recipe import make_recipe, target_of, with_target_defaults
from moec.compiler.pipeline.refusals import check_target
from moec.compiler.pipeline.stages import Stages, silent
from moec.targets.base import Target, TargetOptions


@dataclass(frozen=True)
class Model:
    """A tiny model.

    Attributes:
        family: A name in `golden_models/families.yaml`.
        config: Keys of its configuration that differ.
        recipe: Keys of its recipe.
        forms: Target -> the format of its weights, if they are quantized; the others are stored in floats.
    """

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)

    def recipe_for(self, target: str) -> dict[str, Any]:
        """The recipe for one target, without the checkpoint."""
        if not self.forms:
            return {"target": target, **self.recipe}
        formats = dict.fromkeys(("experts_gate_up", "experts_down", "attention"), self.forms[target])
        return {"target": target, "quantize": {"format": {"formats": formats}, "rounding": "rtn"}}


_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 3 * index for index in range(8)],
    "original_max_position_embeddings": 24,
}
_LONG = {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 24, "max_position_embeddings": 192}


_NARROW = {"intermediate_size": 32}
"""A width that blocks of 32 divide."""
_INT4 = {"onnx": "int4:32", "coreml": "int4:32", "tensorrt": "int4:32", "tflite": "int4:32:bf16:int8-dynamic"}
_INT8 = {"onnx": "int8:32", "coreml": "int8:32", "tensorrt": "int8:32", "tflite": "int8:channel:fp32:int8-dynamic"}
_ASYMMETRIC = dict.fromkeys(("onnx", "coreml", "tensorrt", "tflite"), "int4:32:asym")

MODELS: Mapping[str, Model] = {
    "mixtral": Model("mixtral"),
    "olmoe": Model("olmoe"),
    "qwen2_moe": Model("qwen2_moe"),
    "qwen3_moe": Model("qwen3_moe"),
    "gpt_oss": Model("gpt_oss"),
    "deepseek_v3": Model("deepseek_v3"),
    "granitemoe": Model("granitemoe"),
    "llama4": Model("llama4_text"),
    # A softcap that logits of a random model reach: 30 changes them by less than float16 rounds.
    "beam": Model("beam", config={"final_logit_softcapping": 4.0}),
    "phimoe": Model("phimoe"),
    "qwen3_next": Model("qwen3_next"),
    "glm_moe_dsa": Model("glm_moe_dsa"),
    "longrope": Model("qwen3_moe", config=_LONG),
    "large vocabulary": Model("mixtral", config={"vocab_size": 20_000}),
    "routed": Model(
        "olmoe",
        config={"num_experts_per_tok": 4},
        recipe={"routing": {"policy": "threshold", "parameters": {"tau": 0.2, "importance": [1.0, 0.5]}}},
    ),
    "pruned": Model("mixtral", recipe={"routing": {"policy": "off", "removed": [[1], [2]]}}),
    "int8": Model("mixtral", config=_NARROW, forms=_INT8),
    "int4": Model("mixtral", config=_NARROW, forms=_INT4),
    "int4 asymmetric": Model("mixtral", config=_NARROW, forms=_ASYMMETRIC),
}


@dataclass(frozen=True)
class Ready:
    """A model that is ready to be lowered to one target."""

    built: Built
    target: Target
    options: TargetOptions


class Workshop:
    """Makes each model once, captures it once per dtype, and prepares it once per target.

    Args:
        directory: Where checkpoints are written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._captures = directory, dict[str, Captures]()
        self.ready = cache(self._ready)

    def _ready(self, name: str, target_name: str) -> Ready:
        """The model `name` for a target.

        Raises:
            MoecError: The target refuses the model.
        """
        model = MODELS[name]
        checkpoint = self._directory / name.replace(" ", "_")
        if not (checkpoint / "config.json").is_file():
            write_tiny_checkpoint(model.family, checkpoint, **model.config)
        recipe = make_recipe({"checkpoint": str(checkpoint), **model.recipe_for(target_name)}, where=name)
        target, options = target_of(recipe)
        recipe = with_target_defaults(recipe, target)
        built = build(recipe, target, options, Stages(silent), self._captures.setdefault(name, Captures()))
        check_target(target, built.program, options)
        return Ready(built, target, options)
