"""The only module that imports coremltools: without its messages, and only when the CoreML target is used."""

from __future__ import annotations

import importlib
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moec.compiler.common.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log records up to WARNING.

    At every import on Linux, coremltools warns of untested torch versions and of libraries that exist on
    macOS only; users of moec can do nothing about either.
    """
    previous = logging.root.manager.disable
    logging.disable(max(previous, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def coremltools_module(name: str = "coremltools") -> Any:
    """Import coremltools, or one of its submodules, without its start-up messages.

    Args:
        name: Full module name, such as `coremltools.proto.Model_pb2`.

    Returns:
        The module. coremltools has no type annotations, hence `Any`.

    Raises:
        MissingExtraError: coremltools is not installed.
    """
    with quiet():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != "coremltools":
                raise
            raise MissingExtraError(
                "the CoreML target needs coremltools, which is not installed",
                hint="pip install 'moec[coreml]'",
            ) from error
