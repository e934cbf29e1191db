"""Random recipes for a model: target, options, dtype, formats of weights, routing and pruning."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("onnx", "tflite", "coreml", "tensorrt", "onnx", "tflite", "onnx", "tensorrt", "tflite", "coreml")
"""The targets of successive builds. Core ML, whose artifacts run in Python here, takes the most time."""
POLICIES = (
    "top-p",
    "threshold",
    "ratio",
    "layer-k",
    "capped",
    "entropy",
    "margin",
    "activation-norm",
    "uniform-k",
    "random-drop",
    "per-layer",
)
CLASSES = ("experts_gate_up", "experts_down", "shared_expert", "attention", "embedding", "lm_head")
QUANTIZED_SHARE, ROUTED_SHARE, PRUNED_SHARE = 0.5, 0.4, 0.15
ENGINE_SHARE = 0.15
"""Share of the TensorRT builds that also build the engine, which takes seconds; without a GPU no gate runs it."""


@dataclass(frozen=True)
class Traits:
    """What a recipe has to know of a model.

    Attributes:
        experts: Number of experts of each MoE layer.
        slots: Experts per token.
        routed: Whether the judge can drop slots: the experts are in the registry of transformers.
        quantizable: Whether the judge can round the weights: it knows the class of each.
    """

    experts: tuple[int, ...]
    slots: int
    routed: bool
    quantizable: bool


def draw(traits: Traits, target: str, chance: random.Random) -> dict[str, Any]:
    """A recipe without its checkpoint."""
    recipe: dict[str, Any] = {"target": target, "options": _OPTIONS[target](chance)}
    if chance.random() < 0.4:
        recipe["dtype"] = chance.choice(("fp32", "fp16"))
    if chance.random() < 0.1:
        recipe["inputs_embeds"] = True
    if traits.quantizable and chance.random() < QUANTIZED_SHARE:
        recipe["quantize"] = _quantize(target, chance)
    if traits.routed and chance.random() < ROUTED_SHARE:
        recipe["routing"] = routing(traits, chance, hashed="quantize" not in recipe)
    if traits.routed and chance.random() < PRUNED_SHARE and (removed := _removed(traits, chance)):
        recipe["routing"] = {**recipe.get("routing", {"policy": "off"}), "removed": removed}
    return recipe


def _onnx(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"flavor": chance.choice(("default", "default", "portable", "genai", "web"))}
    if chance.random() < 0.4:
        options["experts"] = chance.choice(("kernel", "grouped"))
    if chance.random() < 0.1:
        options["routing_outputs"] = True
    return options


def _tflite(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"context": chance.choice((48, 64)), "prefill": chance.choice(((8,), (16,), (5, 24)))}
    if chance.random() < 0.3:
        options["flavor"] = "no-control-flow"
    return options


def _coreml(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"context": chance.choice((48, 64)), "prefill_chunk": chance.choice((2, 7, 16, 128))}
    if chance.random() < 0.3:
        options["flavor"] = "swift-transformers"
    return options


def _tensorrt(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "experts": chance.choice(("auto", "gather", "loop-if", "dense")),
        "context": 64,
        "prompt": 16,
        "piece": 64,
        "batch": chance.choice((1, 2)),
        "engine": chance.random() < ENGINE_SHARE,
    }
    if chance.random() < 0.3:
        options["opset"] = chance.choice((20, 23))
    if chance.random() < 0.15:
        options["attention"] = "fused"
    return options


_OPTIONS: Mapping[str, Callable[[random.Random], dict[str, Any]]] = {
    "onnx": _onnx,
    "tflite": _tflite,
    "coreml": _coreml,
    "tensorrt": _tensorrt,
}


def _quantize(target: str, chance: random.Random) -> dict[str, Any]:
    """A quantize section; rounding is to nearest, since the judge rounds for itself."""
    found: dict[str, Any] = {"rounding": "rtn", "format": _format(target, chance)}
    if chance.random() < 0.3:
        found["activations"] = chance.choice(("float", "int8-dynamic"))
    return found


def _format(target: str, chance: random.Random) -> str | dict[str, Any]:
    kind = chance.random()
    if kind < 0.45:
        return chance.choice(("int8", "int4", "fp16"))
    if kind < 0.65:
        return integer(target, chance)
    classes = [name for name in CLASSES if chance.random() < 0.6]
    formats = {name: chance.choice((integer(target, chance), "fp16", "none")) for name in classes}
    if "experts_gate_up" in formats and chance.random() < 0.8:
        formats["experts_down"] = formats["experts_gate_up"]  # QMoE takes no other combination
    plan: dict[str, Any] = {"formats": formats}
    if formats and chance.random() < 0.25:
        name = chance.choice(sorted(formats))
        if name not in {"embedding", "lm_head"}:
            plan["overrides"] = [{"tensor_class": name, "layer": chance.choice((0, 1)), "format": "none"}]
    return plan


def integer(target: str, chance: random.Random) -> str:
    """An integer format; mostly one that the target supports."""
    bits = chance.choice((4, 8))
    if target == "tflite" and chance.random() < 0.9:
        return "int8:channel:fp32:int8-dynamic" if bits == 8 else "int4:auto32:bf16:int8-dynamic"
    words = [f"int{bits}"]
    words += chance.choice(([], ["auto32"], ["channel"], ["32"], ["channel"], []))
    if bits == 4 and chance.random() < 0.25:
        words.append("asym")
    if chance.random() < 0.2:
        words.append(chance.choice(("fp32", "bf16")))
    return ":".join(words)


def routing(traits: Traits, chance: random.Random, *, hashed: bool) -> dict[str, Any]:
    """A routing section with parameters, so that nothing is calibrated.

    Args:
        traits: What the model is like.
        chance: Source of the draws.
        hashed: Whether the policy may drop slots by a hash of the hidden state, which no rounding survives.
    """
    name = chance.choice([name for name in POLICIES if hashed or name != "random-drop"])
    found: dict[str, Any] = {"policy": name, "parameters": parameters(name, traits, chance)}
    if name not in {"layer-k", "per-layer"} and chance.random() < 0.2:
        found["runtime_input"] = True
    return found


@dataclass(frozen=True)
class Numbers:
    """Draws the parameters of policies; lists have a number for each of `layers` MoE layers."""

    layers: int
    slots: int
    chance: random.Random

    def one(self, low: float, high: float) -> float:
        """A number between two others."""
        return round(self.chance.uniform(low, high), 3)

    def each(self, low: float, high: float) -> list[float]:
        """A number for each layer."""
        return [self.one(low, high) for _ in range(self.layers)]

    def count(self) -> int:
        """A number of slots."""
        return self.chance.randint(1, max(1, self.slots))

    def counts(self) -> list[int]:
        """A number of slots for each layer."""
        return [self.count() for _ in range(self.layers)]

    def complexity(self) -> dict[str, Any]:
        """Parameters of the policies that estimate how hard a token is."""
        found: dict[str, Any] = {"center": self.one(0.5, 3.0), "gain": self.one(-1.0, 2.0)}
        return {**found, "location": self.each(-1.0, 1.0), "spread": self.each(0.2, 1.0)}


_PARAMETERS: Mapping[str, Callable[[Numbers], dict[str, Any]]] = {
    "top-p": lambda draw: {"mass": draw.one(0.2, 1.0), "slack": draw.each(0.5, 2.0)},
    "threshold": lambda draw: {
        "tau": draw.one(0.05, 0.5),
        "importance": draw.each(0.3, 1.0),
        "absolute": draw.chance.random() < 0.3,
    },
    "ratio": lambda draw: {"beta": draw.one(0.1, 1.0), "scale": draw.each(0.3, 1.2)},
    "layer-k": lambda draw: {"ks": draw.counts()},
    "capped": lambda draw: {"mass": draw.one(0.4, 1.0), "caps": draw.counts()},
    **dict.fromkeys(("entropy", "margin", "activation-norm"), Numbers.complexity),
    "uniform-k": lambda draw: {"k": draw.count()},
    "random-drop": lambda draw: {"probability": draw.one(0.0, 1.0)},
    "per-layer": lambda draw: {"layers": [_of_one_layer(draw.chance) for _ in range(draw.layers)]},
}


def parameters(name: str, traits: Traits, chance: random.Random) -> dict[str, Any]:
    """Parameters of a policy."""
    found = _PARAMETERS[name](Numbers(len(traits.experts), traits.slots, chance))
    optional = {"slack", "importance", "scale"} & found.keys()
    if optional and chance.random() < 0.5:
        found = {key: value for key, value in found.items() if key not in optional}
    if chance.random() < 0.25:
        found["renormalize"] = False
    return found


def _of_one_layer(chance: random.Random) -> dict[str, Any] | None:
    name = chance.choice(("", "top-p", "threshold", "uniform-k"))
    if not name:
        return None
    return {"policy": name, **parameters(name, Traits((1,), 3, True, True), chance)}


def _removed(traits: Traits, chance: random.Random) -> list[list[int]]:
    """Experts to remove, as many in each layer, so that transformers can build the rest; empty if none can go."""
    spare = min(traits.experts, default=0) - traits.slots
    if spare < 1:
        return []
    count = chance.randint(1, min(2, spare))
    return [sorted(chance.sample(range(experts), count)) for experts in traits.experts]
