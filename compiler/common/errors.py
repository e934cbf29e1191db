"""Every error that moec raises on purpose, and the exit code of each."""

from __future__ import annotations


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


class OutputError(MoecError):
    """The output directory cannot be written."""

    exit_code = 11


def out_of_memory(error: BaseException) -> MoecError | None:
    """What to tell the user where `error` says that memory ran out; None where it says something else."""
    # torch has no class of its own for it.
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return None
    return CheckpointError(
        f"there is not enough memory: {first_line(error)}",
        hint="free memory or raise the limit (ulimit -v, that of the container); an export takes about 1 GB and the "
        "largest expert a few times",
    )


def first_line(error: BaseException) -> str:
    """First line of an exception's text, for one-line messages."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
