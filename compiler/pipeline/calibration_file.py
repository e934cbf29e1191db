"""The file that `moec calibrate` writes: parameters of a routing policy for several expert budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from moec.compiler.common.errors import UsageError
from moec.compiler.common.files import read_json


class CalibrationEntry(BaseModel):
    """Parameters of a policy for one budget, what it keeps of the slots, and any measurements beside them."""

    model_config = ConfigDict(extra="allow")

    budget: FiniteFloat
    parameters: dict[str, Any]
    kept_share: FiniteFloat
    kept_per_layer: list[FiniteFloat]


class CalibrationFile(BaseModel):
    """The content of a file that `moec calibrate` writes."""

    policy: str
    checkpoint: dict[str, str]
    entries: list[CalibrationEntry] = Field(min_length=1)


def read_calibration_file(path: Path) -> CalibrationFile:
    """Read and validate a calibration file.

    Raises:
        UsageError: The file is missing or is not a calibration file; the message names the wrong key.
    """
    try:
        return CalibrationFile.model_validate(read_json(path, UsageError, hint="make one with moec calibrate"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path}: not a calibration file: {where}: {first['msg']}", hint="make one with moec calibrate"
        ) from error
