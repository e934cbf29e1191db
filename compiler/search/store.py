"""Stored evaluations: an append-only file of JSON lines, of which a killed process loses at most the last line.

The file is named by the digest of checkpoint, text and tools, and a line by the digest of the recipe sections. Searches
of one checkpoint on one text may share a directory of such files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moec.compiler.common.digest import sha256_of_json
from moec.compiler.common.errors import OutputError

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Measured:
    """Measurements of a variant on some windows of text.

    Attributes:
        losses: Mean negative log likelihood of each window, nats.
        divergences: Mean KL(pretrained || variant) per token of each window, nats.
        kept: Share of the pretrained slots that each MoE layer executes, for each window.
    """

    losses: tuple[float, ...] = ()
    divergences: tuple[float, ...] = ()
    kept: tuple[tuple[float, ...], ...] = ()

    def __add__(self, more: Measured) -> Measured:
        return Measured(self.losses + more.losses, self.divergences + more.divergences, self.kept + more.kept)

    @property
    def windows(self) -> int:
        """Number of measured windows."""
        return len(self.losses)

    def first(self, windows: int) -> Measured:
        """The measurements of the first windows."""
        return Measured(self.losses[:windows], self.divergences[:windows], self.kept[:windows])

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Measured:
        """Build from the mapping of a JSON line."""
        kept = tuple(tuple(map(float, window)) for window in plain["kept"])
        return cls(tuple(map(float, plain["losses"])), tuple(map(float, plain["divergences"])), kept)


class Store:
    """Evaluations of one checkpoint on one text, in memory and in a file.

    Args:
        directory: Directory of the file; created if it does not exist.
        context: Everything but the recipe sections that determines a result, as JSON values.

    Raises:
        OutputError: The directory cannot be written.
    """

    def __init__(self, directory: Path, context: Mapping[str, Any]) -> None:
        self.path = directory / f"evaluations-{sha256_of_json(context)[:16]}{SUFFIX}"
        self._found: dict[str, Measured] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._load()
        except OSError as error:
            raise OutputError(
                f"{directory}: cannot be written: {error.strerror or error}", hint="choose another directory with -o"
            ) from error

    def _load(self) -> None:
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        whole = 0
        for line in lines[:-1]:
            whole += len(line) + 1
            try:
                plain = json.loads(line)
                self._append(str(plain["key"]), int(plain["start"]), Measured.of(plain))
            except (ValueError, KeyError, TypeError):
                continue  # a damaged line is evaluated again
        if lines and lines[-1]:
            # The process was killed while it wrote this line, so the line is incomplete.
            os.truncate(self.path, whole)

    def _append(self, key: str, start: int, more: Measured) -> None:
        found = self._found.get(key, Measured())
        if start == found.windows:
            self._found[key] = found + more

    def get(self, sections: Mapping[str, Any]) -> Measured:
        """The measurements of a recipe; empty if it was never evaluated."""
        return self._found.get(key_of(sections), Measured())

    def put(self, sections: Mapping[str, Any], start: int, more: Measured) -> None:
        """Store a result.

        Args:
            sections: Sections of the recipe.
            start: Number of windows that were already measured.
            more: Measurements of the windows after them.

        Raises:
            OutputError: The file cannot be written.
        """
        key = key_of(sections)
        self._append(key, start, more)
        line = json.dumps({"key": key, "start": start, **asdict(more)}) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written: {error.strerror or error}", hint="free space, and --resume"
            ) from error

    def __len__(self) -> int:
        return len(self._found)


def key_of(sections: Mapping[str, Any]) -> str:
    """Digest of recipe sections."""
    return sha256_of_json(sections)


def common_windows(found: Sequence[Measured]) -> int:
    """Number of windows on which all of them were measured."""
    return min((item.windows for item in found), default=0)
