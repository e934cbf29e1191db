"""Every error that moec raises on purpose, and the exit code of each."""

from __future__ import annotations

import errno


class MoecError(Exception):
    """Base class: the CLI prints `message` and `hint` without a traceback.

    Args:
        message: What went wrong, and where.
        hint: What the user can do about it.
    """

    exit_code: int = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MoecError):
    """The command, option or recipe makes no sense."""

    exit_code = 2


class UnsupportedModelError(MoecError):
    """The model holds something that cannot be captured; the message names the module and the reason."""

    exit_code = 3


class LoweringError(MoecError):
    """A target has no form for an operation, or its builder refused the graph."""

    exit_code = 4


class MissingExtraError(MoecError):
    """An optional dependency is not installed; the hint is the pip command."""

    exit_code = 8


class ArtifactError(MoecError):
    """An artifact is damaged, incomplete or not an artifact at all."""

    exit_code = 9


class CheckpointError(MoecError):
    """A checkpoint or text is missing, damaged or disagrees with its config."""

    exit_code = 10


class OutOfMemoryError(MoecError):
    """Memory ran out; see `out_of_memory`."""

    exit_code = 10


class OutputError(MoecError):
    """The output directory cannot be written."""

    exit_code = 11


_STARVED = (
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
"""What others say where memory runs out, besides raising MemoryError or an OSError of that number."""


def out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """What to tell the user where memory ran out; None where `error`, and what it was raised from, say other things."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OutOfMemoryError):
        if _starved(cause):
            told = OutOfMemoryError(
                f"there is not enough memory: {first_line(cause)}",
                hint="free memory or raise the limit (ulimit -v, that of the container); an export takes about 1 GB "
                "and the largest expert a few times",
            )
            told.__cause__ = error
            return told
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return cause


def _starved(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(sign in str(error) for sign in _STARVED)


def first_line(error: BaseException) -> str:
    """First line of an exception's text, for one-line messages."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
