"""The quantization plan: number formats per tensor class, with overrides per layer and per expert."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from moec.compiler.common.errors import UsageError
from moec.compiler.common.validation import unknown
from moec.quantize.formats import FP16, NONE, Activations, FloatFormat, Format, IntegerFormat, parse_format


class TensorClass(StrEnum):
    """What a weight is used for. `OTHER` is norms, biases and everything else."""

    EXPERTS_GATE_UP = "experts_gate_up"
    EXPERTS_DOWN = "experts_down"
    SHARED_EXPERT = "shared_expert"
    ATTENTION = "attention"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    ROUTER = "router"
    OTHER = "other"


ALWAYS_FLOAT = {
    TensorClass.ROUTER: "small errors in router logits send tokens to other experts",
    TensorClass.OTHER: "norms and biases are sensitive to rounding, and quantizing them saves hardly any bytes",
}
_EXPERTS = {TensorClass.EXPERTS_GATE_UP, TensorClass.EXPERTS_DOWN}


@dataclass(frozen=True)
class Override:
    """Another format for some tensors of one class.

    Attributes:
        tensor_class: The class.
        format: The format of these tensors.
        layer: The layer that the override applies to; None: every layer.
        expert: The expert that the override applies to; None: every expert.
    """

    tensor_class: TensorClass
    format: Format
    layer: int | None = None
    expert: int | None = None

    def __post_init__(self) -> None:
        where = f"override of {self.tensor_class}"
        _check_float(self.tensor_class, self.format, where)
        if self.layer is None and self.expert is None:
            raise UsageError(
                f"{where}: it names neither a layer nor an expert", hint="set the format of the class instead"
            )
        if self.expert is not None and self.tensor_class not in _EXPERTS:
            raise UsageError(
                f"{where}: this class has no experts, but the override names expert {self.expert}",
                hint=f"only {' and '.join(sorted(_EXPERTS))} have experts",
            )
        if any(index is not None and index < 0 for index in (self.layer, self.expert)):
            raise UsageError(f"{where}: a layer or expert index is negative", hint="indices start at 0")

    def matches(self, tensor_class: TensorClass, layer: int | None, expert: int | None) -> bool:
        """Whether the override applies to this tensor."""
        return self.tensor_class is tensor_class and self.layer in {None, layer} and self.expert in {None, expert}

    @property
    def rank(self) -> tuple[bool, bool]:
        """Precedence: the greater rank wins; an expert beats a layer, and both together beat either."""
        return (self.expert is not None, self.layer is not None)

    def to_dict(self) -> dict[str, str | int]:
        """The override as a dictionary, without fields that are not set."""
        plain: dict[str, str | int] = {"tensor_class": self.tensor_class.value}
        if self.layer is not None:
            plain["layer"] = self.layer
        if self.expert is not None:
            plain["expert"] = self.expert
        return plain | {"format": str(self.format)}


@dataclass(frozen=True)
class QuantizationPlan:
    """A format for every tensor class, with overrides.

    Attributes:
        formats: One entry per class, in the order of `TensorClass`.
        overrides: Sorted overrides; at most one per class, layer and expert.
    """

    formats: tuple[tuple[TensorClass, Format], ...]
    overrides: tuple[Override, ...] = ()

    @classmethod
    def build(cls, formats: Mapping[TensorClass, Format], overrides: Iterable[Override] = ()) -> QuantizationPlan:
        """Make a plan; classes that are not named keep the dtype of the checkpoint ("none").

        Raises:
            UsageError: A class that must stay float has another format, or two overrides apply to the same tensors.
        """
        for tensor_class, chosen in formats.items():
            _check_float(tensor_class, chosen, "quantization plan")
        ordered = sorted(overrides, key=_override_key)
        for first, second in itertools.pairwise(ordered):
            if _override_key(first) == _override_key(second):
                raise UsageError(f"quantization plan: two overrides for {first.to_dict()}", hint="keep one of them")
        return cls(tuple((member, formats.get(member, NONE)) for member in TensorClass), tuple(ordered))

    def format_for(self, tensor_class: TensorClass, *, layer: int | None = None, expert: int | None = None) -> Format:
        """The format of a tensor, or of one expert's matrix in a stack; the most specific override wins."""
        matching = [override for override in self.overrides if override.matches(tensor_class, layer, expert)]
        if matching:
            return max(matching, key=lambda override: override.rank).format
        return dict(self.formats)[tensor_class]

    def to_dict(self) -> dict[str, object]:
        """The plan as a dictionary for YAML and the manifest, in a fixed order."""
        plain: dict[str, object] = {
            "formats": {tensor_class.value: str(chosen) for tensor_class, chosen in self.formats}
        }
        if self.overrides:
            plain["overrides"] = [override.to_dict() for override in self.overrides]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, object]) -> QuantizationPlan:
        """Read the dictionary of `to_dict`.

        Raises:
            UsageError: An unknown key, class or format, or a plan that `build` refuses.
        """
        _check_keys(plain, {"formats", "overrides"}, "quantization plan")
        formats = plain.get("formats", {})
        overrides = plain.get("overrides", [])
        if not isinstance(formats, Mapping) or not isinstance(overrides, list):
            raise UsageError(
                "quantization plan: `formats` must be a mapping and `overrides` a list",
                hint="for example: formats: {experts_down: int4}",
            )
        chosen = {parse_class(str(key)): parse_format(str(value)) for key, value in formats.items()}
        return cls.build(chosen, [_parse_override(entry) for entry in overrides])


def parse_class(text: str) -> TensorClass:
    """Read the name of a tensor class.

    Raises:
        UsageError: No class has this name; the hint gives the nearest one.
    """
    names = [member.value for member in TensorClass]
    if text in names:
        return TensorClass(text)
    raise unknown(text, names, "unknown tensor class", "the tensor classes")


def preset(name: str) -> QuantizationPlan:
    """The plan behind `--quantize fp16|int8|int4|none`.

    Raises:
        UsageError: No preset has this name.
    """
    if name not in PRESETS:
        known = [*PRESETS, "palettize4", "auto", "keep"]
        raise unknown(name, known, "unknown quantization", "a format such as int4:128, a plan in a recipe, or one of")
    return PRESETS[name]


def requested(wanted: str | Mapping[str, object]) -> QuantizationPlan:
    """The plan that a recipe or a flag requests: a preset, a quantized format, or a plan as a dictionary.

    As in the preset int4, a 4-bit format gives embedding and lm_head 8 bits, with the same block size if it has one.

    Raises:
        UsageError: The text is neither a preset nor a format, or the plan is invalid.
    """
    if not isinstance(wanted, str):
        return QuantizationPlan.from_dict(wanted)
    if wanted in PRESETS:
        return PRESETS[wanted]
    if wanted.partition(":")[0] not in _CODED:
        return preset(wanted)
    chosen = parse_format(wanted)
    ends = replace(chosen, bits=8, symmetric=True) if isinstance(chosen, IntegerFormat) else IntegerFormat(8)
    return _uniform(chosen, embedding=ends, lm_head=ends)


def with_activations(plan: QuantizationPlan, activations: Activations) -> QuantizationPlan:
    """`plan` with `activations` in every integer format."""

    def changed(chosen: Format) -> Format:
        return replace(chosen, activations=activations) if isinstance(chosen, IntegerFormat) else chosen

    return QuantizationPlan(
        tuple((tensor_class, changed(chosen)) for tensor_class, chosen in plan.formats),
        tuple(replace(override, format=changed(override.format)) for override in plan.overrides),
    )


def _check_float(tensor_class: TensorClass, chosen: Format, where: str) -> None:
    reason = ALWAYS_FLOAT.get(tensor_class)
    if reason is not None and not isinstance(chosen, FloatFormat):
        raise UsageError(
            f"{where}: {tensor_class} cannot be {chosen}, since it always stays float: {reason}",
            hint=f"leave {tensor_class} out, or write none or fp16",
        )


def _override_key(override: Override) -> tuple[int, int, int]:
    order = list(TensorClass).index(override.tensor_class)
    layer = -1 if override.layer is None else override.layer
    return (order, layer, -1 if override.expert is None else override.expert)


def _check_keys(plain: Mapping[str, object], valid: set[str], where: str) -> None:
    for key in plain:
        if key not in valid:
            raise UsageError(f"{where}: unknown key {key!r}", hint=f"valid: {', '.join(sorted(valid))}")


def _parse_override(entry: object) -> Override:
    where = "override in the quantization plan"
    if not isinstance(entry, Mapping):
        raise UsageError(
            f"{where}: {entry!r} is not a mapping",
            hint="for example: {tensor_class: experts_down, layer: 0, format: int8}",
        )
    _check_keys(entry, {"tensor_class", "layer", "expert", "format"}, where)
    for key in ("tensor_class", "format"):
        if key not in entry:
            raise UsageError(f"{where}: {dict(entry)} lacks {key!r}", hint="add it")
    indices = {key: entry.get(key) for key in ("layer", "expert")}
    for key, index in indices.items():
        if index is not None and (not isinstance(index, int) or isinstance(index, bool)):
            raise UsageError(f"{where}: {key} {index!r} is not an integer", hint="indices start at 0")
    tensor_class, chosen = parse_class(str(entry["tensor_class"])), parse_format(str(entry["format"]))
    return Override(tensor_class, chosen, **indices)


def _uniform(chosen: Format, **others: Format) -> QuantizationPlan:
    """`chosen` for every class that may be quantized, except `others`."""
    formats = {member: chosen for member in TensorClass if member not in ALWAYS_FLOAT}
    return QuantizationPlan.build(formats | {TensorClass(key): value for key, value in others.items()})


_CODED = ("int8", "int4", "palettize4")
PRESETS = {
    "fp16": _uniform(FP16),
    "int8": _uniform(IntegerFormat(8)),
    # 4 bits for embedding and lm_head would lose about as much quality as 4 bits for all other weights together.
    "int4": _uniform(IntegerFormat(4), embedding=IntegerFormat(8), lm_head=IntegerFormat(8)),
    "none": QuantizationPlan.build({}),
}
