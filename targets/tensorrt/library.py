"""The only module that imports TensorRT for RTX (`tensorrt_rtx`) or classic TensorRT (`tensorrt`): one API."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from enum import StrEnum
from typing import Any

from moec.compiler.common.errors import MissingExtraError

RTX, CLASSIC = "tensorrt_rtx", "tensorrt"
INSTALL = "pip install 'moec[tensorrt]'"


class Library(StrEnum):
    """Which TensorRT builds the engine."""

    AUTO = "auto"
    RTX = "rtx"
    CLASSIC = "classic"


def installed(module: str) -> bool:
    """Whether a library can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def module_name(wanted: Library) -> str:
    """Name of the module to build with; for "auto", TensorRT for RTX if it is installed, else classic TensorRT.

    Raises:
        MissingExtraError: The library is not installed.
    """
    candidates = {Library.AUTO: (RTX, CLASSIC), Library.RTX: (RTX,), Library.CLASSIC: (CLASSIC,)}[wanted]
    for name in candidates:
        if installed(name):
            return name
    if wanted is Library.CLASSIC:
        raise MissingExtraError("classic TensorRT is not installed", hint="pip install tensorrt (needs a GPU)")
    raise MissingExtraError(f"the TensorRT target needs {RTX}, which is not installed", hint=INSTALL)


def load(name: str) -> Any:
    """Import the module `name`, which `module_name` returned.

    Raises:
        MissingExtraError: The module cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"{name} cannot be imported: {error}", hint=INSTALL) from error


def version(name: str) -> str:
    """Version of an installed distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
