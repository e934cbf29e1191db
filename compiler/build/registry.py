"""A registry that is a directory: versions of artifacts, and aliases of versions with their history.

```
REGISTRY/NAME/index.json  aliases.json  .lock  VERSION/<the artifact>
```

index.json lists the versions with what is known of each. aliases.json holds the events of all aliases; `aliases` in it
is what they amount to, for programs that read it. Both are replaced in one step, and whoever writes holds the lock.
`REGISTRY/NAME@ALIAS` and `REGISTRY/NAME@VERSION` stand for the artifact wherever a command takes one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import filelock
from pydantic import BaseModel, ConfigDict, ValidationError

from moec.compiler.build import aliases
from moec.compiler.build.aliases import Event
from moec.compiler.common.artifact import read_manifest, verify
from moec.compiler.common.errors import ArtifactError, OutputError, UsageError, first_line
from moec.compiler.common.files import read_json, write_output
from moec.compiler.common.staging import staged
from moec.compiler.common.validation import unknown

if TYPE_CHECKING:
    from moec.compiler.build.publish import Publication

INDEX, ALIASES, LOCK = "index.json", "aliases.json", ".lock"
SCHEMA_VERSION = 1
WAIT = 600.0
"""Seconds to wait for another process that publishes into the same model."""
_HINT = "restore the file, or give another registry"
_Model = TypeVar("_Model", bound=BaseModel)


class _Version(BaseModel):
    model_config = ConfigDict(extra="allow")

    version: str
    digest: str = ""
    gates: dict[str, str] = {}
    bytes: int = 0
    proven: str = ""


class _Index(BaseModel):
    """index.json of a model."""

    versions: list[_Version]


class _Aliases(BaseModel):
    """aliases.json of a model; `aliases` follows from `history` and is not read."""

    history: list[Event]


@dataclass(frozen=True)
class DirectoryRegistry:
    """A registry in `root`."""

    root: Path

    def names(self) -> list[str]:
        """Names of all models, sorted.

        Raises:
            UsageError: There is no such directory.
        """
        if not self.root.is_dir():
            raise UsageError(f"{self.root}: there is no such registry", hint="give the directory of 'moec publish'")
        return sorted(path.parent.name for path in self.root.glob(f"*/{INDEX}"))

    def add(self, order: Publication) -> dict[str, str]:
        """Copy an artifact into the registry; return its `version` and `location`.

        Raises:
            UsageError: The version is the name of an alias.
            OutputError: The version exists already, or the registry cannot be written.
        """
        shelf = self.root / order.name
        with _locked(shelf):
            index = _read_index(shelf)
            version = _free_version(shelf, index, order.version)
            with staged(shelf / version) as place:
                for name, path in order.files().items():
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, place / name)
            entries = [entry for entry in index if entry["version"] != version]
            _write(shelf / INDEX, {"versions": [*entries, {"version": version, **order.metadata}]})
        return {"version": version, "location": str(shelf / version)}

    def describe(self, name: str) -> dict[str, Any]:
        """`versions`, `aliases` (alias -> version) and `history` of a model.

        Raises:
            UsageError: There is no such model.
            OutputError: A file of the registry is damaged.
        """
        shelf = self._shelf(name)
        events = _read_events(shelf)
        facts = ("version", "digest", "gates", "bytes", "proven")
        return {
            "versions": [{key: entry[key] for key in facts} for entry in _read_index(shelf)],
            "aliases": aliases.current(events),
            "history": [event.model_dump() for event in events],
        }

    def promote(self, name: str, version: str, alias: str, *, note: str, allow_failed: bool) -> Event | None:
        """Let an alias name a version; None if it does so already.

        Raises:
            UsageError: The model or version is unknown, or the alias is the name of a version.
            ArtifactError: The artifact is damaged, or a gate failed.
        """
        shelf = self._shelf(name)
        with _locked(shelf):
            index = _read_index(shelf)
            aliases.check_alias(alias, (entry["version"] for entry in index))
            entry = _entry(name, index, version)
            _check_unchanged(shelf, entry)
            if not allow_failed:
                aliases.check_proven(name, version, entry["gates"].items())
            events = _read_events(shelf)
            event = aliases.promotion(events, alias, version, note)
            if event is not None:
                _write_events(shelf, [*events, event])
        return event

    def rollback(self, name: str, alias: str, *, note: str) -> Event:
        """Let an alias name the version before the present one.

        Raises:
            UsageError: The model or alias is unknown, or the alias has no history.
            ArtifactError: The artifact of that version is missing or damaged.
        """
        shelf = self._shelf(name)
        with _locked(shelf):
            events = _read_events(shelf)
            event = aliases.rollback(events, name, alias, note)
            _check_unchanged(shelf, _entry(name, _read_index(shelf), event.version))
            _write_events(shelf, [*events, event])
        return event

    def _shelf(self, name: str) -> Path:
        known = self.names()
        if name not in known:
            raise unknown(name, known, f"{self.root}: unknown model", "the models there")
        return self.root / name


def resolve(given: Path) -> Path:
    """The artifact that a path names: `REGISTRY/NAME@ALIAS` or `REGISTRY/NAME@VERSION`, or else the path itself.

    Raises:
        UsageError: The model has no such alias or version.
        OutputError: A file of the registry is damaged.
    """
    name, _, wanted = given.name.rpartition("@")
    if not name or given.expanduser().exists():
        return given
    shelf = given.expanduser().parent / name
    if not (shelf / INDEX).is_file():
        return given
    versions = [str(entry["version"]) for entry in _read_index(shelf)]
    named = aliases.current(_read_events(shelf))
    version = named.get(wanted, wanted)
    if version not in versions:
        raise unknown(wanted, [*named, *versions], f"{shelf}: unknown alias or version", "its aliases and versions")
    return shelf / version


@contextlib.contextmanager
def _locked(shelf: Path) -> Iterator[None]:
    """Hold the lock of a model, so that two processes that publish or promote at once lose nothing.

    Raises:
        OutputError: The directory cannot be written, or another process has held the lock for too long.
    """
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(shelf / LOCK, timeout=WAIT)
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputError(
            f"{shelf}: another process has been writing for more than {WAIT:.0f} s", hint="wait for it, or end it"
        ) from error
    except OSError as error:
        raise OutputError(f"{shelf}: cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _free_version(shelf: Path, index: Sequence[dict[str, Any]], wanted: str | None) -> str:
    numbers = [int(entry["version"]) for entry in index if entry["version"].isdigit()]
    following = str(max(numbers, default=0) + 1)
    if wanted is None:
        return following
    if (shelf / wanted).exists():
        raise OutputError(
            f"{shelf}: version {wanted} exists already",
            hint=f"give another version with --as, or omit it to get {following}",
        )
    if wanted in aliases.current(_read_events(shelf)):
        raise UsageError(f"--as: {wanted!r} is an alias of this model", hint=f"omit --as to get {following}")
    return wanted


def _entry(name: str, index: Sequence[dict[str, Any]], version: str) -> dict[str, Any]:
    for entry in index:
        if entry["version"] == version:
            return entry
    raise unknown(version, (entry["version"] for entry in index), f"{name}: unknown version", "its versions")


def _check_unchanged(shelf: Path, entry: dict[str, Any]) -> None:
    """Check that the artifact of a version is the one that was published.

    Raises:
        ArtifactError: It is not.
    """
    place = shelf / entry["version"]
    verify(place)
    if read_manifest(place)["digest"] != entry["digest"]:
        raise ArtifactError(f"{place}: not the artifact that was published", hint="publish it again")


def _read_index(shelf: Path) -> list[dict[str, Any]]:
    content = _read(shelf / INDEX)
    return [] if content is None else [entry.model_dump() for entry in _parsed(shelf / INDEX, _Index, content).versions]


def _read_events(shelf: Path) -> list[Event]:
    content = _read(shelf / ALIASES)
    if content is None:
        return []
    return _parsed(shelf / ALIASES, _Aliases, {"history": content.get("history")}).history


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path, OutputError, hint=_HINT) if path.exists() else None


def _parsed(path: Path, model: type[_Model], content: dict[str, Any]) -> _Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise OutputError(f"{path}: damaged: {first_line(error)}", hint=_HINT) from error


def _write_events(shelf: Path, events: Sequence[Event]) -> None:
    _write(shelf / ALIASES, {"aliases": aliases.current(events), "history": [event.model_dump() for event in events]})


def _write(path: Path, content: dict[str, Any]) -> None:
    write_output(
        path, json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n", hint="free space, then repeat"
    )
