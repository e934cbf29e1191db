"""The settings of a search, stored as search.json in its directory so that a stopped search can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moec.compiler.common.errors import ArtifactError, CheckpointError, OutputError, UsageError
from moec.compiler.common.files import read_json, write_output
from moec.compiler.common.validation import validate
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.pipeline.recipe import DType
from moec.compiler.search.objectives import OBJECTIVES, Objective, parse_objectives

FILE, GENERATIONS_FILE = "search.json", "generations.jsonl"
SCHEMA_VERSION = 1
SPACE_HINT = "free space, and --resume"
POPULATION, GENERATIONS = 64, 40


class Settings(BaseModel):
    """Every input that determines the result of a search."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(min_length=1, description="Directory or hub id.")
    target: str = Field(min_length=1, description="Name of the target.")
    objectives: str = Field(default="perplexity,expert-flops,size", description="Comma-separated names.")
    limits: dict[str, float] = Field(default_factory=dict, description="Name of an objective -> its upper limit.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the target.")
    dtype: DType | None = Field(default=None, description="Precision of float weights; None: the target's.")
    device: str | None = Field(default=None, description="A device profile; None: this machine.")
    population: int = Field(default=POPULATION, ge=4, description="Individuals per generation.")
    generations: int | None = Field(default=None, ge=0, description="Generations after the first.")
    budget: float | None = Field(default=None, gt=0, description="Seconds after which no generation starts.")
    share: float = Field(default=0.15, gt=0, le=1, description="Largest share of the individuals that is measured.")
    text: str | None = Field(default=None, description="Text on which individuals are measured.")
    held_out: str | None = Field(default=None, description="Text on which the front is evaluated at the end.")
    windows: int = Field(default=32, ge=4, description="Number of windows on which an individual is measured.")
    window: int = Field(default=256, gt=1, description="Tokens per window.")
    held_out_windows: int = Field(default=96, ge=4, description="Number of windows on which the front is evaluated.")
    members: int = Field(default=6, ge=0, description="Number of members of the front that are built.")
    seed: int = Field(default=0, ge=0, description="Seed of the random number generators.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    trust_remote_code: bool = Field(default=False, description="Run modelling code of the checkpoint.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.generations is not None and self.budget is not None:
            raise ValueError("generations and budget cannot both be given")
        for name in self.limits:
            if name not in OBJECTIVES:
                raise ValueError(f"{name} is not an objective")
        return self

    @property
    def goals(self) -> tuple[Objective, ...]:
        """The objectives."""
        return parse_objectives(self.objectives)

    @property
    def bounds(self) -> Mapping[Objective, float]:
        """The limits."""
        return {OBJECTIVES[name]: limit for name, limit in self.limits.items()}

    @property
    def last(self) -> int | None:
        """Number of the last generation; None if the search has a time budget instead."""
        return None if self.budget is not None else GENERATIONS if self.generations is None else self.generations


class _File(BaseModel):
    """The content of search.json; `source` has the digests of the checkpoint's files."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    source: dict[str, str]
    settings: dict[str, Any]


def make_settings(fields: Mapping[str, Any]) -> Settings:
    """Validate the settings; a field that is None takes its default.

    Raises:
        UsageError: A value is invalid.
    """
    found = validate(Settings, {key: value for key, value in fields.items() if value is not None}, where="search")
    parse_objectives(found.objectives)
    return found


def begin(directory: Path, settings: Settings, checkpoint: Checkpoint) -> None:
    """Write search.json into the directory of a new search, or of one that never finished its first generation.

    Raises:
        UsageError: The directory already holds a search.
        OutputError: The directory holds other files, or cannot be written.
    """
    there = (directory / FILE).exists()
    if (directory / GENERATIONS_FILE).exists():
        raise UsageError(
            f"{directory} already contains a search",
            hint=f"resume it with: moec search {directory} --resume; or choose another directory with -o",
        )
    if directory.exists() and not there and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(
            f"{directory} exists and does not contain a search", hint="choose an empty directory or a new one"
        )
    content = {
        "schema_version": SCHEMA_VERSION,
        "source": dict(sorted(checkpoint.digests.items())),
        "settings": settings.model_dump(mode="json"),
    }
    write_output(directory / FILE, json.dumps(content, indent=2) + "\n", hint="choose another directory with -o")


def resumed(directory: Path, checkpoint: str | None = None) -> Settings:
    """Read the settings of a search that was started.

    Args:
        directory: The directory of the search.
        checkpoint: Present location of the checkpoint; None: the location in search.json.

    Raises:
        ArtifactError: The directory contains no search, or search.json is damaged.
        CheckpointError: The checkpoint is missing or has changed.
    """
    path = directory / FILE
    if not path.is_file():
        raise ArtifactError(
            f"{directory} does not contain a search: {FILE} is missing",
            hint="start one: moec search CHECKPOINT -o DIRECTORY",
        )
    content = read_json(path, ArtifactError, hint="start the search again in another directory")
    try:
        stored = _File.model_validate(content)
    except ValidationError as error:
        raise ArtifactError(
            f"{path} was not written by this version of moec",
            hint="start the search again in another directory",
        ) from error
    settings = make_settings({**stored.settings, **({"checkpoint": checkpoint} if checkpoint else {})})
    opened = Checkpoint.open(
        settings.checkpoint, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    known, found = stored.source, opened.digests
    if differing := sorted(name for name in {*known, *found} if known.get(name) != found.get(name)):
        raise CheckpointError(
            f"{directory} is a search of another checkpoint than {opened.directory}: {', '.join(differing[:4])} differ",
            hint="restore the original checkpoint, or start a search of this one in another directory",
        )
    return settings
