"""The file that `moec calibrate` writes: parameters of a routing policy for several expert budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moec.compiler.common.errors import UsageError
from moec.compiler.common.files import read_json


class CalibrationEntry(BaseModel):
    """Parameters of a policy for one budget; what was measured beside them is kept as it is."""

    model_config = ConfigDict(extra="allow")

    budget: float
    parameters: dict[str, Any]


class CalibrationFile(BaseModel):
    """What `moec calibrate` writes."""

    policy: str
    checkpoint: dict[str, str]
    entries: list[CalibrationEntry] = Field(min_length=1)


def read_calibration_file(path: Path) -> CalibrationFile:
    """Read the file.

    Raises:
        UsageError: It is missing, or not what `moec calibrate` writes; the message names the key.
    """
    try:
        return CalibrationFile.model_validate(read_json(path, UsageError, hint="moec calibrate writes one"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path}: not a calibration file: {where}: {first['msg']}", hint="moec calibrate writes one"
        ) from error
