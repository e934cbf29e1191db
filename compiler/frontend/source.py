"""The location and the digests of a checkpoint. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moec.compiler.common.digest import sha256_of_file
from moec.compiler.common.errors import CheckpointError, UsageError, first_line
from moec.compiler.common.files import write_atomically

SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model", ".py"})
"""Suffixes of the files of a checkpoint on which the result of an export may depend."""


def resolve(location: str, revision: str | None = None) -> Path:
    """Directory of a checkpoint, downloaded if it is a hub id.

    Args:
        location: Directory or hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: There is no checkpoint at the location, or the hub does not deliver it.
        UsageError: A revision is given for a directory.
    """
    directory = Path(location).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise UsageError(
                f"{directory} is a directory and has no revision {revision!r}", hint="--revision is for hub ids"
            )
        if not (directory / "config.json").is_file():
            raise CheckpointError(
                f"{directory}: not a checkpoint: it has no config.json",
                hint="give the directory that save_pretrained wrote, or a hub id such as allenai/OLMoE-1B-7B-0924",
            )
        return directory
    if directory.exists() or location.startswith((".", "/", "~")) or location.count("/") != 1:
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(
            f"{location}: not a checkpoint: it {what}",
            hint="give a directory with config.json and safetensors files, or a hub id (owner/name)",
        )
    return _download(location, revision)


PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py")
"""Files that are downloaded. Python files run only with --trust-remote-code."""


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{hub_id}: no such directory, and the hub does not deliver it: {first_line(error)}",
            hint="check the name, the revision, the network and, for a gated model, `hf auth login`",
        ) from error


class Digests:
    """sha256 of files, cached on disk: a file is read again only if its size, times or inode have changed."""

    def __init__(self, memory: Path) -> None:
        """Use the cache file `memory`, which may be missing or damaged."""
        self._memory = memory
        self._known: dict[str, list[str]] = {}
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        if isinstance(known, dict):
            self._known = known

    def of(self, location: Path) -> dict[str, str]:
        """Path below `location` -> digest, of a file or of every file in a directory.

        Raises:
            CheckpointError: Something cannot be read.
        """
        try:
            return {str(path.relative_to(location)): self._digest(path) for path in _files(location)}
        except OSError as error:
            raise CheckpointError(f"{location}: cannot be read: {first_line(error)}") from error

    def save(self) -> None:
        """Write the cache file."""
        write_atomically(self._memory, json.dumps(self._known))

    def _digest(self, path: Path) -> str:
        found = path.stat()
        state = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
        known = self._known.get(str(path.resolve()))
        if not isinstance(known, list) or known[:1] != [state]:
            known = [state, sha256_of_file(path)]
            self._known[str(path.resolve())] = known
        return known[1]


def _files(location: Path) -> Iterator[Path]:
    if location.is_dir():
        yield from sorted(path for path in location.rglob("*") if path.is_file() and path.suffix in SUFFIXES)
    else:
        yield location
