"""The one place that imports TensorRT: for RTX (`tensorrt_rtx`) or classic (`tensorrt`), the same API in both."""

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
    """Name of the module to build with: TensorRT for RTX where it is installed, else classic.

    Raises:
        MissingExtraError: What is wanted is not installed.
    """
    candidates = {Library.AUTO: (RTX, CLASSIC), Library.RTX: (RTX,), Library.CLASSIC: (CLASSIC,)}[wanted]
    for name in candidates:
        if installed(name):
            return name
    if wanted is Library.CLASSIC:
        raise MissingExtraError("classic TensorRT is not installed", hint="pip install tensorrt, where a GPU is")
    raise MissingExtraError(f"the TensorRT target needs {RTX}, which is not installed", hint=INSTALL)


def load(name: str) -> Any:
    """Import a library that `module_name` has named.

    Raises:
        MissingExtraError: It cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"{name} cannot be imported: {error}", hint=INSTALL) from error


def version(name: str) -> str:
    """Version of an installed library; empty where it has none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
