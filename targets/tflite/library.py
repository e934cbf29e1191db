"""The only module that imports LiteRT, and only when the TFLite target is used."""

from __future__ import annotations

import importlib
from typing import Any

from moec.compiler.common.errors import MissingExtraError


def module(name: str) -> Any:
    """Import a module of the extra, such as `ai_edge_litert.interpreter`. They have no type annotations.

    Raises:
        MissingExtraError: The package of the module is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name not in (name, package):
            raise
        raise MissingExtraError(
            f"the TFLite target needs {package}, which is not installed", hint="pip install 'moec[tflite]'"
        ) from error


def schema() -> Any:
    """The module of classes and functions generated from the schema of `.tflite` files."""
    return module("ai_edge_litert.schema_py_generated")
