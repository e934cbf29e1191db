"""The schema of front.json, the result of a search.

`docs/front.schema.json` is the same schema as JSON Schema; a test compares the two.
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
    """A relative increase of perplexity with its 95 % interval; 0.01 is 1 %."""

    value: float
    low: float = Field(description="Lower end of the 95 % interval, by paired bootstrap over windows.")
    high: float


class HeldOut(_Plain):
    """Measurements on held-out text."""

    perplexity: Interval
    divergence: float | None = Field(default=None, description="KL from the pretrained model, nats per token.")
    values: dict[str, float] = Field(default_factory=dict, description="Name of an objective -> value.")


class Built(_Plain):
    """The artifact of a member."""

    directory: str
    exit_code: int
    summary: str
    bytes: int = Field(description="Bytes of all files.")
    verdicts: dict[str, str] = Field(description="Gate -> status.")
    held_out: HeldOut | None = Field(
        default=None, description="Measured in the target's runtime; None if the build failed."
    )
    decode_seconds: float | None = Field(default=None, description="Measured median of a decode step after 128 tokens.")


class LayerChoice(_Plain):
    """The choices of a member for one MoE layer."""

    rule: str = Field(description="Policy with its parameters; empty if all slots are kept.")
    kept: float = Field(description="Share of executed slots on the text of the search.")
    removed: int = Field(description="Number of pruned experts.")
    tokens: list[int] = Field(
        default_factory=list,
        description="Tokens of 8 windows of held-out text that each expert computes; a pruned one computes none.",
    )


class Member(_Plain):
    """One recipe of the front."""

    name: str
    recipe: str = Field(description="Recipe file, relative to the directory of the search.")
    command: str = Field(description="Command that builds it.")
    values: dict[str, float] = Field(description="Name of an objective -> value on the text of the search.")
    predicted: float | None = Field(description="Loss that the surrogate predicted before the measurement, nats.")
    generation: int
    layers: list[LayerChoice]
    formats: dict[str, str] = Field(description="Part of the model -> format.")
    held_out: HeldOut = Field(description="Measured in the interpreter.")
    artifact: Built | None = Field(default=None, description="None if it was not built.")


class SurrogateFacts(_Plain):
    """Accuracy of the surrogate."""

    rank_correlation: float | None = Field(
        description="Spearman's, of predicted and measured losses of individuals outside the fit."
    )
    individuals: int = Field(description="Number of individuals of the rank correlation.")
    misleads: bool
    predicted: list[float] = Field(description="Predicted loss of each of these individuals, nats.")
    measured: list[float]


class GenerationFacts(_Plain):
    """Progress after a generation."""

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
    worst: dict[str, float] = Field(description="Reference point of the hypervolume.")
    hypervolume: dict[str, float] = Field(description="On the text of the search, and on held-out text.")
    individuals: int
    measured: int
    given_up: int = Field(description="Individuals measured on some windows only, since they were certainly dominated.")
    lost: int = Field(description="Individuals that could not be measured.")
    single_choices: int = Field(description="Runs that measured the sensitivity of single genes.")
    seconds: float = Field(description="Seconds of all generations.")
    members: list[Member]
    pretrained_tokens: list[list[int]] = Field(
        default_factory=list, description="For each MoE layer, `tokens` of the pretrained model."
    )
    not_told_apart: list[tuple[str, str]] = Field(
        description="Neighbours whose losses on held-out text do not differ significantly."
    )
    surrogate: SurrogateFacts
    generations: list[GenerationFacts]


def read_front(directory: Path) -> Front:
    """Read the front of a finished search.

    Raises:
        ArtifactError: The file is missing or damaged.
        UsageError: The file does not have this version's schema.
    """
    path = directory / FILE
    if not path.is_file():
        raise ArtifactError(
            f"{directory} does not contain {FILE}", hint=f"finish the search: moec search {directory} --resume"
        )
    return validate(
        Front, read_json(path, ArtifactError, hint="finish the search again with --resume"), where=str(path)
    )
