"""The recipes of `recipes/*.yaml`, one file per model. `benchmarks/zoo.py` makes these files, and nobody edits them.

`zoo:MODEL/NAME` stands for a recipe wherever a recipe file is taken. Recipes of models that come with moec were
measured by a search; those of released models were not run: sizes and times are estimates, and their quality is open.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from moec.compiler.common.errors import UsageError
from moec.compiler.common.validation import unknown

PREFIX = "zoo:"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Part):
    """A relative increase of perplexity with its 95 % interval; 0.01 is 1 %."""

    value: float
    low: float
    high: float


class Measured(_Part):
    """What was measured of a recipe on held-out text."""

    perplexity: Range
    divergence: float = Field(description="KL from the pretrained model, nats per token.")
    values: dict[str, float] = Field(description="Name of an objective of the search -> value.")
    artifact_bytes: int | None = Field(default=None, description="Bytes of the artifact, if it was built.")
    gates: dict[str, str] = Field(default_factory=dict, description="Gate -> verdict, if it was built.")


class DeviceEstimate(_Part):
    """What `moec estimate --device` says."""

    decode_seconds: float = Field(description="Lower bound of a decode step, by bandwidth and peak FLOP/s.")
    fits: bool = Field(description="Whether weights and states fit into its memory.")


class Estimated(_Part):
    """What `moec estimate` says of a recipe; nothing was run."""

    weights: int = Field(description="Bytes of all weights.")
    memory: int = Field(description="Bytes of weights and states after 128 tokens.")
    parameters: int
    active: int = Field(description="Parameters that one token uses, without dynamic routing.")
    devices: dict[str, DeviceEstimate] = Field(description="Device profile -> estimate.")


class Entry(_Part):
    """One recipe, with what is known of it."""

    recipe: dict[str, Any] = Field(description="The recipe without its checkpoint.")
    quality: Literal["measured", "not measured"]
    measure: str = Field(description="Command that measures it.")
    measured: Measured | None = None
    estimated: Estimated | None = None


class Model(_Part):
    """The recipes of one model."""

    model: str
    checkpoint: str = Field(description="Where it is: in the repository, or where its config.json was read.")
    source: dict[str, str] = Field(default_factory=dict, description="Digests of the checkpoint that was measured.")
    made: dict[str, Any] = Field(description="Command, commit, versions, texts and machine of these figures.")
    recipes: dict[str, Entry]


def model_names() -> tuple[str, ...]:
    """Names of all models with recipes, sorted."""
    return tuple(sorted((item.name.removesuffix(".yaml") for item in _folder().iterdir()), key=str.lower))


def _folder() -> Any:
    return importlib.resources.files("moec").joinpath("compiler", "zoo", "recipes")


@functools.cache
def load_model(name: str) -> Model:
    """The recipes of a model.

    Raises:
        UsageError: There are none; the hint has the nearest name.
    """
    if name not in model_names():
        raise unknown(name, model_names(), "the zoo has no model", "its models")
    return Model.model_validate(yaml.safe_load(_folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8")))


def entry_names() -> tuple[str, ...]:
    """MODEL/NAME of every recipe."""
    return tuple(f"{name}/{recipe}" for name in model_names() for recipe in load_model(name).recipes)


def load_entry(name: str) -> tuple[Model, Entry]:
    """A recipe by MODEL/NAME, with or without the prefix `zoo:`.

    Raises:
        UsageError: There is no such recipe; the hint has the nearest name.
    """
    model, slash, recipe = name.removeprefix(PREFIX).partition("/")
    if not slash:
        raise UsageError(f"{name!r} is not MODEL/NAME", hint=f"such as {entry_names()[0]}; 'moec zoo' lists all")
    found = load_model(model)
    if recipe not in found.recipes:
        raise unknown(recipe, found.recipes, f"the zoo has no recipe of {model}", "its recipes")
    return found, found.recipes[recipe]


def recipe_fields(name: str) -> dict[str, Any]:
    """The fields of the recipe `zoo:MODEL/NAME`, to which a checkpoint is missing."""
    return dict(load_entry(name)[1].recipe)


def caution(name: str, digests: Mapping[str, str]) -> str:
    """What to know about a recipe that is built from a checkpoint with these digests; empty if its figures hold for it.

    Args:
        name: The recipe, `zoo:MODEL/NAME`; any other text needs no caution.
        digests: File of the checkpoint -> sha256.
    """
    if not name.startswith(PREFIX):
        return ""
    model, entry = load_entry(name)
    if entry.quality != "measured":
        return f"{name}: its quality was not measured; {entry.measure}"
    differing = sorted(file for file, digest in model.source.items() if digests.get(file) != digest)
    if not differing:
        return ""
    named = ", ".join(differing[:4])
    return f"{name} was measured on another checkpoint ({named} differ), so its figures are not those of this artifact"
