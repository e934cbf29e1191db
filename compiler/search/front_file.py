"""front.json: what a search found, with what it was measured on. The models here are its schema.

`docs/front.schema.json` is this as JSON Schema; a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.files import read_json
from moec.compiler.common.validation import validate

FILE = "front.json"
SCHEMA_VERSION = 1


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Plain):
    """An increase of perplexity: 0.01 is 1 %."""

    value: float
    low: float = Field(description="Of the 95 % interval: paired bootstrap over windows.")
    high: float


class HeldOut(_Plain):
    """What held-out text says."""

    perplexity: Interval
    divergence: float | None = Field(default=None, description="KL from the pretrained model, nats per token.")
    values: dict[str, float] = Field(default_factory=dict, description="Name of an objective -> value.")


class Built(_Plain):
    """The artifact of a member."""

    directory: str
    exit_code: int
    summary: str
    bytes: int = Field(description="Of all files.")
    verdicts: dict[str, str] = Field(description="Gate -> status.")
    held_out: HeldOut | None = Field(default=None, description="By the runtime of the target; None where it failed.")
    decode_seconds: float | None = Field(default=None, description="Measured median of a decode step after 128 tokens.")


class LayerChoice(_Plain):
    """What a member does in one MoE layer."""

    rule: str = Field(description="Policy with its parameters; empty where all slots stay.")
    kept: float = Field(description="Share of the slots that are executed on the text of the search.")
    removed: int = Field(description="Experts that are pruned.")


class Member(_Plain):
    """One recipe of the front."""

    name: str
    recipe: str = Field(description="Its file, relative to the directory of the search.")
    command: str = Field(description="What builds it.")
    values: dict[str, float] = Field(description="Name of an objective -> value on the text of the search.")
    predicted: float | None = Field(description="What the surrogate expected of its loss before it was measured, nats.")
    generation: int
    layers: list[LayerChoice]
    formats: dict[str, str] = Field(description="Part of the model -> format.")
    held_out: HeldOut = Field(description="By the interpreter.")
    artifact: Built | None = Field(default=None, description="None where it was not built.")


class SurrogateFacts(_Plain):
    """How well the surrogate predicts."""

    rank_correlation: float | None = Field(
        description="Spearman's, of predicted and measured loss of individuals that it was not fitted to."
    )
    individuals: int = Field(description="Those that it is taken over.")
    misleads: bool
    predicted: list[float] = Field(description="Nats, of each of them.")
    measured: list[float]


class GenerationFacts(_Plain):
    """What was known after a generation."""

    number: int
    individuals: int
    measured: int
    volume: float = Field(description="Hypervolume of the front, as a share of the box between zero and `worst`.")
    front: int


class Front(_Plain):
    """The content of front.json."""

    schema_version: int = SCHEMA_VERSION
    moec: str
    settings: dict[str, Any]
    source: dict[str, str] = Field(description="Digests of the checkpoint.")
    texts: dict[str, str] = Field(description="sha256 of the text of the search and of the held-out text.")
    objectives: list[str]
    worst: dict[str, float] = Field(description="The point that hypervolume is measured from.")
    hypervolume: dict[str, float] = Field(description="Of the members: on the text of the search, on held-out text.")
    individuals: int
    measured: int
    given_up: int = Field(description="Measured on some windows alone, since they were dominated beyond doubt.")
    lost: int = Field(description="Individuals that could not be measured.")
    single_choices: int = Field(description="Runs that measured what single choices lose.")
    seconds: float = Field(description="Of the generations.")
    members: list[Member]
    not_told_apart: list[tuple[str, str]] = Field(
        description="Neighbours whose losses held-out text does not tell apart."
    )
    surrogate: SurrogateFacts
    generations: list[GenerationFacts]


def read_front(directory: Path) -> Front:
    """The front of a search that has ended.

    Raises:
        ArtifactError: There is none, or the file is damaged.
        UsageError: It is not what this version writes.
    """
    path = directory / FILE
    if not path.is_file():
        raise ArtifactError(
            f"{directory}: no {FILE} in it", hint=f"let the search end: moec search {directory} --resume"
        )
    return validate(Front, read_json(path, ArtifactError, hint="let the search end anew (--resume)"), where=str(path))
