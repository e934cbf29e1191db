"""The recipe: what to build. A YAML file, the command line and `moec.export` all make one.

```yaml
checkpoint: allenai/OLMoE-1B-7B-0924   # a hub id or a directory; "./..." is relative to the recipe
target: onnx
dtype: fp16
options:                               # of the target; see `moec export --target onnx --help`
  flavor: genai
routing:                               # see docs/routing.md; without it every token uses all its experts
  policy: top-p
  budget: 0.6                          # or max_quality_loss: 1%, or calibration: FILE, or parameters: {mass: 0.9}
quantize:                              # see docs/quantization.md; `quantize: int4` is short for the format alone
  format: int4                         # fp16, int8, int4, none, auto, keep, a format such as int4:128, or a plan
  kv_cache: int8                       # or float, the default
  calibration: texts/
coverage:
  min: 25%                             # of the experts of each layer that are run one by one; all by default
quality:
  max_loss: 1%
latency:                               # see docs/latency.md
  budget: {decode.p50: 12ms, size: 400MB}
  baseline: ../main/out                # an artifact, measured in turns with this one
```
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moec.compiler.common.errors import UsageError
from moec.compiler.common.files import read_yaml
from moec.compiler.common.validation import unknown, validate
from moec.compiler.zoo.entries import PREFIX, recipe_fields
from moec.targets import get_target
from moec.targets.base import Target, TargetOptions

DType = Literal["fp32", "fp16"]
DEMANDS = ("coverage", "quality", "latency")
"""Sections that only gates read. They do not change the artifact, so moec.json does not hold them."""
SECTIONS = ("routing", "quantize", *DEMANDS)
"""Keys of a recipe whose values are mappings; flags set the keys of these mappings one by one."""


_PATHS = ("calibration", "text", "baseline")
"""Keys of sections whose values are paths."""


def _fraction(value: Any) -> Any:
    """A share that may be written in percent: "1%" is 0.01."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


def _section_of_format(value: Any) -> Any:
    """`quantize: int4` is short for `quantize: {format: int4}`."""
    return {"format": value} if isinstance(value, str) else value


class RoutingRecipe(BaseModel):
    """Which experts a token may skip, and which experts are pruned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = Field(default="off", description="Routing policy, or off.")
    budget: Annotated[float | None, BeforeValidator(_fraction)] = Field(
        default=None, gt=0, le=1, description="Share of the pretrained top-k to keep."
    )
    max_quality_loss: Annotated[float | None, BeforeValidator(_fraction)] = Field(
        default=None,
        ge=0,
        description="Largest allowed relative increase of perplexity.",
    )
    calibration: str | None = Field(default=None, description="File that moec calibrate wrote.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="Parameters of the policy, instead of calibration."
    )
    text: str | None = Field(default=None, description="Calibration text: a file or a directory.")
    runtime_input: bool = Field(default=False, description="Make the policy's threshold an input with a default.")
    text_sha256: str | None = Field(default=None, description="Digest that the calibration text must have.")
    compensation: int = Field(
        default=0, ge=0, le=4096, description="Rank of the linear map that stands in for dropped experts; 0: none."
    )
    prune: Annotated[float | None, BeforeValidator(_fraction)] = Field(
        default=None, gt=0, lt=1, description="Share of every layer's experts to remove, by REAP saliency."
    )
    removed: list[list[int]] | None = Field(default=None, description="Experts to remove, a list per MoE layer.")

    @property
    def does_nothing(self) -> bool:
        """Whether the section leaves the model unchanged."""
        return self.policy == "off" and not self.prune and self.removed is None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sources = [self.max_quality_loss, self.parameters, self.calibration or self.budget]
        if sum(source is not None for source in sources) > 1:
            raise ValueError("give only one of: budget or calibration, max_quality_loss, parameters")
        given = self.runtime_input or self.compensation or any(source is not None for source in sources)
        if self.policy == "off" and given:
            raise ValueError("settings of a routing policy are given without a policy")
        if self.parameters is not None and self.compensation:
            raise ValueError("compensation is one of the parameters of the policy if these are given")
        return self


class QuantizeRecipe(BaseModel):
    """The formats in which weights are stored, and keys and values kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str | dict[str, Any] = Field(
        default="none",
        description="fp16, int8, int4, none, auto, keep (codes of the checkpoint), one format such as int4:128, or a "
        "plan: formats and overrides.",
    )
    rounding: Literal["auto", "rtn", "gptq"] = Field(
        default="auto",
        description="To nearest, or GPTQ on calibration text; auto takes GPTQ if a format has 4 bits.",
    )
    kv_cache: Literal["float", "int8"] = Field(
        default="float",
        description="Format of keys and values in the KV cache; int8 has a scale per channel, measured on text.",
    )
    calibration: str | None = Field(default=None, description="Calibration text: a file or a directory.")
    calibration_sha256: str | None = Field(default=None, description="Digest that the calibration text must have.")
    windows: int = Field(default=96, gt=0, description="Number of windows of calibration text.")
    window: int = Field(default=256, gt=1, description="Tokens per window.")
    activations: Literal["auto", "float", "int8-dynamic"] = Field(
        default="auto",
        description="What kernels may round activations to; auto is what the target is fastest with, float is what "
        "each format says.",
    )
    max_size: str | int | None = Field(
        default=None,
        description="For auto: largest size of the weights: 300MB, 1.5GB, or 0.3x of their size in fp16.",
    )
    max_perplexity_increase: Annotated[float | None, BeforeValidator(_fraction)] = Field(
        default=None, gt=0, description="For auto: largest relative increase of perplexity that it may predict."
    )

    @property
    def does_nothing(self) -> bool:
        """Whether the section leaves the model unchanged."""
        return not self.weights and not self.cache

    @property
    def weights(self) -> bool:
        """Whether weights get another format."""
        return self.format != "none"

    @property
    def cache(self) -> bool:
        """Whether the KV cache gets another format."""
        return self.kv_cache != "float"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        limits = sum(limit is not None for limit in (self.max_size, self.max_perplexity_increase))
        if self.format == "auto" and limits != 1:
            raise ValueError("format auto needs either max_size or max_perplexity_increase")
        if self.format != "auto" and limits:
            raise ValueError("max_size and max_perplexity_increase are for format auto")
        return self


class CoverageRecipe(BaseModel):
    """Demands of the coverage gate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Annotated[float, BeforeValidator(_fraction)] = Field(
        default=1.0, ge=0, le=1, description="Share of the live experts of each layer that the gate runs one by one."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_search(cls, given: Any) -> Any:
        if isinstance(given, dict) and "tokens" in given:
            raise ValueError("the key tokens was removed: experts are run one by one, without a search for prompts")
        return given


class QualityRecipe(BaseModel):
    """Demands of the quality gate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_loss: Annotated[float | None, BeforeValidator(_fraction)] = Field(
        default=None, ge=0, description="Largest relative increase of perplexity; None: the gate is off."
    )
    text: str | None = Field(default=None, description="Held-out text: a file or a directory.")
    windows: int = Field(default=64, gt=1, description="Number of windows of text.")
    window: int = Field(default=256, gt=1, description="Tokens per window.")


class LatencyRecipe(BaseModel):
    """Demands of the latency gate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: str | dict[str, str] | None = Field(
        default=None, description="Limits: decode.p50=12ms,prefill128.p90=300ms,load=2s,size=400MB."
    )
    baseline: str | None = Field(default=None, description="Artifact to compare with.")
    max_regression: Annotated[float, BeforeValidator(_fraction)] = Field(
        default=0.05, gt=0, description="How much slower than the baseline the artifact may be, as a share."
    )
    threads: int = Field(default=1, ge=1, description="Threads of the runtime.")
    contexts: tuple[int, ...] = Field(default=(128, 512), min_length=1, description="Prompt lengths in tokens.")
    seconds: float = Field(default=120.0, gt=0, description="Longest time of sampling in seconds.")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.contexts) < 1:
            raise ValueError("every context must have at least one token")
        return self


class Recipe(BaseModel):
    """Everything that determines the artifact and its gates; no output path and no display option."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(min_length=1, description="Directory or hub id of the checkpoint.")
    target: str = Field(min_length=1, description="Name of the target.")
    dtype: DType | None = Field(
        default=None,
        description="Precision of activations and of weights that are not quantized; None: the target's own.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the target.")
    routing: RoutingRecipe | None = Field(default=None, description="Dynamic routing and expert pruning.")
    quantize: Annotated[QuantizeRecipe | None, BeforeValidator(_section_of_format)] = Field(
        default=None, description="The formats of weights and of the KV cache."
    )
    coverage: CoverageRecipe = Field(default=CoverageRecipe(), description="Demands of the coverage gate.")
    quality: QualityRecipe | None = Field(default=None, description="Demands of the quality gate.")
    latency: LatencyRecipe | None = Field(default=None, description="Demands of the latency gate.")
    inputs_embeds: bool = Field(
        default=False, description="Add an input of embeddings, for tokens without an id, such as images."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    trust_remote_code: bool = Field(default=False, description="Run modelling code of the checkpoint.")

    def canonical(self, options: BaseModel) -> dict[str, Any]:
        """The recipe for moec.json, with every default and without the keys that do not change the artifact.

        The location of the checkpoint is left out, since moec.json has its digests, and so is the consent to run its
        code.

        Args:
            options: `self.options` as the target's own Options object.
        """
        plain = self.model_dump(
            mode="json", exclude={"checkpoint", "options", "revision", "trust_remote_code", *DEMANDS}
        )
        return {**plain, "options": options.model_dump(mode="json")}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file, or `zoo:MODEL/NAME`, as a mapping, which the command line may complete or override.

    Raises:
        UsageError: The file cannot be read, is not a YAML mapping, or has an unknown key; the zoo has no such recipe.
    """
    if str(path).startswith(PREFIX):
        return recipe_fields(str(path))
    fields = read_yaml(path, UsageError, hint="a recipe is a mapping of keys, such as 'target: onnx'")
    for key in fields:
        if key not in Recipe.model_fields:
            raise unknown(key, Recipe.model_fields, f"{path}: unknown recipe key", "the keys of a recipe")
    return with_absolute_paths(fields, path.parent)


def with_absolute_paths(fields: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """`fields` of a recipe with its paths made absolute; relative ones are relative to `directory`."""
    found, directory = dict(fields), directory.resolve()
    checkpoint = found.get("checkpoint")
    if isinstance(checkpoint, str) and checkpoint.startswith("."):
        found["checkpoint"] = str(directory / checkpoint)
    for name in SECTIONS:
        if isinstance(section := found.get(name), dict):
            near = {key: str(directory / str(section[key])) for key in _PATHS if section.get(key)}
            found[name] = {**section, **near}
    return found


def make_recipe(fields: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Make a Recipe of a mapping; `where` names its origin in messages.

    Raises:
        UsageError: A key is unknown or a value is not valid; the message names it, and the hint the valid ones.
    """
    for key, flag in (("checkpoint", "CHECKPOINT"), ("target", "--target")):
        if not fields.get(key):
            raise UsageError(f"{where}: no {key} is given", hint=f"give {flag}, or '{key}:' in a recipe file")
    return validate(Recipe, fields, where=where)


def with_target_defaults(recipe: Recipe, target: Target) -> Recipe:
    """`recipe` with the target's default dtype if it has none, and with the formats of the target's preset it names."""
    recipe = recipe.model_copy(update={"dtype": recipe.dtype or target.default_dtype})
    settings = recipe.quantize
    if settings is None or not isinstance(settings.format, str) or settings.format not in target.presets:
        return recipe
    own = {"format": {"formats": dict(target.presets[settings.format])}}
    return recipe.model_copy(update={"quantize": settings.model_copy(update=own)})


def target_of(recipe: Recipe) -> tuple[Target, TargetOptions]:
    """The target of a recipe and its options.

    Raises:
        UsageError: There is no such target, or an option is not valid.
    """
    target = get_target(recipe.target)
    return target, validate(target.Options, recipe.options, where=f"options of target {target.name}")
