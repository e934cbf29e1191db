"""What a search was asked for: the file search.json in its directory, by which it goes on after it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    """Everything that decides what a search finds, and how it is run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(min_length=1, description="Directory or hub id.")
    target: str = Field(min_length=1, description="Name of the target.")
    objectives: str = Field(default="perplexity,expert-flops,size", description="Names, separated by commas.")
    limits: dict[str, float] = Field(default_factory=dict, description="Name of an objective -> the most it may be.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the target.")
    dtype: DType | None = Field(default=None, description="Precision of what is not quantized; None: the target's.")
    device: str | None = Field(default=None, description="A device profile; None: this machine.")
    population: int = Field(default=POPULATION, ge=4, description="Individuals of a generation.")
    generations: int | None = Field(default=None, ge=0, description="Generations after the first.")
    budget: float | None = Field(default=None, gt=0, description="Seconds after which no generation is begun.")
    share: float = Field(default=0.15, gt=0, le=1, description="Share of the individuals that may be measured.")
    text: str | None = Field(default=None, description="Text that individuals are measured on.")
    held_out: str | None = Field(default=None, description="Text that the front is judged on at the end.")
    windows: int = Field(default=32, ge=4, description="Windows that an individual is measured on.")
    window: int = Field(default=256, gt=1, description="Tokens of a window.")
    held_out_windows: int = Field(default=96, ge=4, description="Windows that the front is judged on.")
    members: int = Field(default=6, ge=0, description="Members of the front that are built.")
    seed: int = Field(default=0, ge=0, description="Of all that chance decides.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    trust_remote_code: bool = Field(default=False, description="Run modelling code of the checkpoint.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.generations is not None and self.budget is not None:
            raise ValueError("generations and budget exclude each other")
        for name in self.limits:
            if name not in OBJECTIVES:
                raise ValueError(f"{name} is no objective")
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
        """The last generation; None where time decides."""
        return None if self.budget is not None else GENERATIONS if self.generations is None else self.generations


def make_settings(fields: Mapping[str, Any]) -> Settings:
    """Validate what is asked for; None is what was not given.

    Raises:
        UsageError: A value makes no sense.
    """
    found = validate(Settings, {key: value for key, value in fields.items() if value is not None}, where="search")
    parse_objectives(found.objectives)
    return found


def begin(directory: Path, settings: Settings, checkpoint: Checkpoint) -> None:
    """Write search.json into the directory of a new search, or of one that never came to its first generation.

    Raises:
        UsageError: There is a search, or something else, already.
        OutputError: It cannot be written.
    """
    there = (directory / FILE).exists()
    if (directory / GENERATIONS_FILE).exists():
        raise UsageError(
            f"{directory}: there is a search already",
            hint=f"go on with it: moec search {directory} --resume; or choose another directory with -o",
        )
    if directory.exists() and not there and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(
            f"{directory} is there, and is no search", hint="choose a directory that is empty, or is not there"
        )
    content = {
        "schema_version": SCHEMA_VERSION,
        "source": dict(sorted(checkpoint.digests.items())),
        "settings": settings.model_dump(mode="json"),
    }
    write_output(directory / FILE, json.dumps(content, indent=2) + "\n", hint="choose another directory with -o")


def resumed(directory: Path, checkpoint: str | None = None) -> Settings:
    """The settings of a search that was begun.

    Args:
        directory: Of the search.
        checkpoint: Where the checkpoint lies now; None: where it lay.

    Raises:
        ArtifactError: There is no search, or its file is damaged.
        CheckpointError: The checkpoint is missing, or another one lies there now.
    """
    path = directory / FILE
    if not path.is_file():
        raise ArtifactError(
            f"{directory}: there is no search in it ({FILE})", hint="moec search CHECKPOINT -o DIRECTORY begins one"
        )
    content = read_json(path, ArtifactError, hint="begin the search anew in another directory")
    if content.get("schema_version") != SCHEMA_VERSION or not isinstance(content.get("settings"), dict):
        raise ArtifactError(f"{path}: not what this version of moec writes", hint="begin the search anew")
    settings = make_settings({**content["settings"], **({"checkpoint": checkpoint} if checkpoint else {})})
    opened = Checkpoint.open(
        settings.checkpoint, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    known, found = content.get("source") or {}, opened.digests
    if differing := sorted(name for name in {*known, *found} if known.get(name) != found.get(name)):
        raise CheckpointError(
            f"{directory} is a search of another checkpoint than {opened.directory}: {', '.join(differing[:4])} differ",
            hint="give it back its checkpoint, or begin a search of this one in another directory",
        )
    return settings
