"""An output directory that is written atomically: under a temporary name next to its destination, then renamed.

While it is being written it is called `.NAME.partial-XXXX` and its descriptor is locked. The lock tells the next export
whether a living process is still writing it or a killed one left it behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moec.compiler.common.artifact import is_artifact
from moec.compiler.common.errors import MoecError, OutputError
from moec.compiler.common.files import partial_prefix, replacing

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SPARE_BYTES = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def staged(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `output` when the block ends without an error, and is removed otherwise.

    Args:
        output: The destination, which may exist as an empty directory.
        overwrite: Whether an existing artifact may be replaced. Nothing else is ever replaced.

    Raises:
        OutputError: `output` exists, or cannot be written, or the disk is full.
    """
    output = output.expanduser().resolve()
    check_output(output, overwrite=overwrite)
    # After an exchange the temporary path holds the old artifact, which `replacing` then removes.
    with contextlib.ExitStack() as lock, _output_errors(output), replacing(output, _publish) as directory:
        _clean(output)
        directory.mkdir()
        lock.enter_context(_locked(directory))
        yield directory
        _sync(directory)
        check_output(output, overwrite=overwrite)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def check_output(output: Path, *, overwrite: bool = False) -> None:
    """Refuse an output that would destroy existing files.

    Raises:
        OutputError: It is a file, a directory with other files than an artifact, or an artifact without `overwrite`.
    """
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise OutputError(f"{output}: is a file", hint="give a directory, existing or not, with -o")
    with _output_errors(output):
        empty = not any(output.iterdir())
    if empty:
        return
    if not is_artifact(output):
        raise OutputError(f"{output}: holds files that are not an artifact", hint="give a new or empty directory")
    if not overwrite:
        raise OutputError(f"{output}: holds an artifact already", hint="pass --overwrite to replace it")


def _clean(output: Path) -> None:
    """Remove what killed exports to `output` left behind; a locked directory belongs to a living export."""
    for path in output.parent.iterdir():
        if not path.name.startswith(partial_prefix(output)) or not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path)
        finally:
            os.close(descriptor)


def _sync(directory: Path) -> None:
    """Force files and folders to the disk, so that a power cut after the rename loses nothing."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(directory: Path, output: Path) -> None:
    if is_artifact(output):
        _exchange(directory, output)
    else:
        directory.rename(output)  # over nothing, or over an empty directory
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(directory: Path, output: Path) -> None:
    """Swap two directories in one step where the system can (Linux), else in two."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        paths = (_AT_FDCWD, os.fsencode(directory), _AT_FDCWD, os.fsencode(output))
        if renameat2(*paths, _RENAME_EXCHANGE) == 0:
            return
    with tempfile.TemporaryDirectory(prefix=partial_prefix(output), dir=output.parent) as aside:
        output.rename(Path(aside) / "old")
        directory.rename(output)


@contextlib.contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """Turn errors of the file system into an OutputError.

    Libraries report a full disk in many ways, so any error on a full disk counts as one.
    """
    try:
        yield
    except MoecError:
        raise
    except OSError as error:
        if error.errno in _FULL or _is_full(output.parent):
            raise _full_disk(output) from error
        if not _concerns(error, output):
            raise
        at = "" if str(error.filename) == str(output) else f" at {error.filename}"
        raise OutputError(
            f"{output}: cannot be written: {error.strerror or error}{at}", hint="choose another directory with -o"
        ) from error
    except Exception as error:
        if _is_full(output.parent):
            raise _full_disk(output) from error
        raise


def _full_disk(output: Path) -> OutputError:
    return OutputError(
        f"{output}: cannot be written: no space left on the disk; nothing was kept",
        hint="free some space, or choose another disk with -o",
    )


def _is_full(parent: Path) -> bool:
    try:
        return shutil.disk_usage(parent).free < _SPARE_BYTES
    except OSError:
        return False


def _concerns(error: OSError, output: Path) -> bool:
    """Whether an error is about the output and not about another file."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    return any(Path(name).is_relative_to(output.parent) or output.is_relative_to(name) for name in names)
