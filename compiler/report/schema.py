"""The schema of report.json, on which other programs may rely.

`docs/report.schema.json` is the same as JSON Schema; a test compares the two. `schema_version` is raised when a key is
removed or changes its meaning, not when one is added. Infinity and NaN are the strings "inf" and "nan".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.sections import Count, Figures, Summary
from moec.compiler.common.verdict import Status

SCHEMA_VERSION = 1
JSON, HTML, JUNIT = "report.json", "report.html", "report.xml"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class VerdictRecord(_Part):
    """The verdict of one gate."""

    gate: str = Field(description="Name of the gate, with a step where it has several.")
    status: Status = Field(description="A gate that did not run is never a pass.")
    summary: str = Field(description="One line for people.")
    exit_code: int = Field(description="Exit code of the command if this gate fails.")
    figures: dict[str, Any] = Field(
        default_factory=dict,
        description="Measurements, with keys that depend on the gate: `seconds` is its duration, `cases` lists the "
        "cases of a parity gate, `steps` has the number of tokens of each expert of each layer (coverage).",
    )

    @field_validator("figures")
    @classmethod
    def _can_be_shown(cls, figures: dict[str, Any]) -> dict[str, Any]:
        Figures.model_validate(figures, strict=False)
        return figures


class Machine(_Part):
    """The machine on which the figures were measured."""

    cpu: str
    cores: int
    logical_cores: int
    memory_bytes: int
    os: str
    python: str


class RejectionRecord(_Part):
    """Where and why a pass or the target left something unchanged."""

    source: str
    where: str
    reason: str


class Report(_Part):
    """report.json."""

    schema_version: int = Field(description="Raised when a key is removed or changes its meaning.")
    created: str = Field(description="Time of the gates: UTC, ISO 8601.")
    exit_code: int = Field(description="0 unless a gate failed.")
    summary: dict[str, Any] = Field(
        default_factory=dict,
        description="What was made, with the next commands; missing in older reports.",
    )
    verdicts: list[VerdictRecord] = Field(description="One per gate, including gates that did not run.")
    timings: dict[str, float] = Field(description="Stage -> seconds of wall-clock time, in order.")
    machine: Machine
    versions: dict[str, str] = Field(description="Tool -> version, from moec.json.")
    model: dict[str, Any] = Field(description="The compiled model, from moec.json.")
    recipe: dict[str, Any] = Field(description="The recipe, from moec.json.")
    routing: dict[str, Any] = Field(
        default_factory=dict, description="Decisions and savings of dynamic routing, from moec.json."
    )
    quantization: dict[str, Any] = Field(
        default_factory=dict, description="Decisions and errors of quantization, from moec.json."
    )
    foreign: dict[str, Any] = Field(
        default_factory=dict,
        description="What was found in a model file of another exporter; empty for an artifact of moec.",
    )
    rejections: list[RejectionRecord]
    files: dict[str, Count] = Field(description="File of the artifact -> bytes.")
    tensor_bytes: dict[str, Count] = Field(
        description="Tensor class -> bytes of its weights in the formats of the plan, or as stated by the target."
    )

    @field_validator("summary")
    @classmethod
    def _in_numbers(cls, summary: dict[str, Any]) -> dict[str, Any]:
        """Read infinity and NaN, which are texts in the file, as numbers."""
        return {**summary, **Summary.model_validate(summary).model_dump(exclude_unset=True)} if summary else {}


def json_schema() -> dict[str, Any]:
    """The schema as JSON Schema (draft 2020-12)."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**dialect, **Report.model_json_schema(mode="serialization")}


def read_report(directory: Path) -> Report:
    """Read the report.json of an artifact.

    Raises:
        ArtifactError: The file is missing or damaged, or has another schema version.
    """
    path = directory / JSON
    try:
        report = Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read: {error.strerror or error}",
            hint="moec validate writes a new report",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(
            f"{path}: not a report: {where}: {first['msg']}", hint="moec validate writes a new report"
        ) from error
    if report.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema version {report.schema_version}, this moec reads {SCHEMA_VERSION}",
            hint="moec validate writes a new report",
        )
    return report
