"""Every error that moec raises on purpose: one class per exit code, so that callers can catch what they handle."""

from __future__ import annotations

import errno
from typing import ClassVar


class MoecError(Exception):
    """Base class: the CLI prints `message` and `hint` without a traceback.

    Args:
        message: What went wrong, and where.
        hint: What the user can do about it; without one, the hint of the class.
    """

    exit_code: int = 70
    usual_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class UsageError(MoecError):
    """A command, option or recipe is not valid."""

    exit_code = 2
    usual_hint = "'moec COMMAND --help' lists the options; docs/ describes recipes and matrices"


class UnsupportedModelError(MoecError):
    """The model has a part that cannot be captured; the message names the module and the reason."""

    exit_code = 3
    usual_hint = "'moec families' lists what works; please report a released model that does not"


class LoweringError(MoecError):
    """A target cannot express an operation, or its builder refused the graph."""

    exit_code = 4


class MissingExtraError(MoecError):
    """An optional dependency is not installed; the hint is the pip command."""

    exit_code = 8


class ArtifactError(MoecError):
    """An artifact is damaged, incomplete or not an artifact at all."""

    exit_code = 9
    usual_hint = "copy the artifact again, or export it again"


class CheckpointError(MoecError):
    """A checkpoint or text is missing, damaged or disagrees with its config."""

    exit_code = 10
    usual_hint = "download the checkpoint again"


class OutOfMemoryError(MoecError):
    """Memory ran out; `out_of_memory` recognises it."""

    exit_code = 10


class OutputError(MoecError):
    """The output directory cannot be written."""

    exit_code = 11
    usual_hint = "free space, or choose another directory"


_NO_MEMORY = (
    "allocate memory",  # torch, the C library
    "alloc_cpu.cpp",  # torch
    "bad_alloc",  # C++
    "bad allocation",  # ONNX Runtime
    "start new thread",  # its stack
    "pthread_create",
    "map segment from shared object",  # a library, which is loaded where it is first used
    "without setting an exception",  # CPython, in an import
    "error return without exception set",  # CPython, where an extension could not allocate its result
)
"""Parts of the messages by which libraries report a lack of memory, besides MemoryError and OSError with ENOMEM."""


def out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """The error to show if `error`, or an exception in its chain of causes, means that memory ran out; else None."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OutOfMemoryError):
        if _means_no_memory(cause):
            told = OutOfMemoryError(
                f"there is not enough memory: {first_line(cause)}",
                hint="free memory or raise the limit (ulimit -v, or that of the container); an export takes about 1 GB "
                "and a few times the size of the largest expert",
            )
            told.__cause__ = error
            return told
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return cause


def _means_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(sign in str(error) for sign in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """First line of an exception's text, for one-line messages."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
