"""A cache of artifacts. The key is a digest of the source, the recipe and the versions of all tools.

Entries are written atomically, so a killed build leaves none. Large files are hard links if the file system supports
them, so an entry and the artifacts made from it take the space of one artifact.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moec
from moec.compiler.common.artifact import REPORTS, is_artifact, read_manifest
from moec.compiler.common.digest import sha256_of_chunks, sha256_of_json
from moec.compiler.common.errors import OutputError
from moec.compiler.common.files import replacing
from moec.compiler.common.staging import staged
from moec.compiler.frontend.source import Digests, resolve
from moec.compiler.pipeline.recipe import SECTIONS, Recipe
from moec.compiler.report.schema import JSON

INDEX = "index.json"
_TEXTS = ("calibration", "text")


def default_directory() -> Path:
    """The default directory of the cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moec" / "builds"


class Cache:
    """A directory of artifacts, each under its key."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.expanduser().resolve()
        self._digests = Digests(self.directory / "digests.json")

    def key(self, recipe: Recipe) -> str:
        """The key of `recipe`: a hex digest of everything on which its artifact and verdicts depend.

        Raises:
            CheckpointError: The checkpoint or a text is missing.
            ArtifactError: The baseline is not an artifact.
        """
        plain = recipe.model_dump(mode="json", exclude={"checkpoint", "revision", "trust_remote_code"})
        texts = {}
        for section in SECTIONS:
            for name in _TEXTS:
                if location := (plain.get(section) or {}).pop(name, None):
                    texts[f"{section}.{name}"] = self._digests.of(Path(location))
        if baseline := (plain.get("latency") or {}).get("baseline"):
            # The verdict depends on the baseline's content, not on its path.
            plain["latency"]["baseline"] = read_manifest(Path(baseline))["digest"]
        decides = {
            "source": self._digests.of(resolve(recipe.checkpoint, recipe.revision)),
            "recipe": plain,
            "texts": texts,
            "tools": tools(),
        }
        self._save()
        return sha256_of_json(decides)

    def restore(self, key: str, output: Path) -> bool:
        """Put the artifact of `key` at `output`, replacing an artifact there.

        Returns:
            False if the cache has no such entry, or its files have changed.

        Raises:
            OutputError: `output` holds other files than an artifact, or cannot be written.
        """
        entry = self._entry(key)
        try:
            index = json.loads((entry / INDEX).read_text(encoding="utf-8"))
            intact = index["files"] == _states(entry / "artifact")
        except (OSError, ValueError, TypeError, KeyError):
            return False
        if not intact:
            shutil.rmtree(entry, ignore_errors=True)
            return False
        if _same(output, entry / "artifact"):
            return True
        with staged(output, overwrite=True) as directory:
            _link(entry / "artifact", directory)
        return True

    def store(self, key: str, artifact: Path) -> None:
        """Add an artifact to the cache; an existing entry is kept.

        Raises:
            OutputError: The cache cannot be written.
        """
        entry = self._entry(key)
        try:
            with replacing(entry, _unless_there) as whole:
                (whole / "artifact").mkdir(parents=True)
                _link(artifact, whole / "artifact")
                index = {"artifact": str(artifact), "files": _states(whole / "artifact")}
                (whole / INDEX).write_text(json.dumps(index), encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"{self.directory}: the cache cannot be written: {error.strerror or error}",
                hint="give another directory with --cache",
            ) from error

    def _entry(self, key: str) -> Path:
        return self.directory / key[:2] / key

    def _save(self) -> None:
        try:
            self._digests.save()
        except OSError as error:
            raise OutputError(
                f"{self.directory}: the cache cannot be written: {error.strerror or error}",
                hint="give another directory with --cache",
            ) from error


def _unless_there(whole: Path, entry: Path) -> None:
    if not entry.exists():
        whole.rename(entry)


@functools.cache
def tools() -> Mapping[str, Any]:
    """The tools on which an artifact depends: moec and its code, Python, and all installed distributions."""
    root = Path(moec.__file__).parent
    packages = ("compiler", "passes", "quantize", "targets")
    modules = (path for package in packages for path in sorted((root / package).rglob("*.py")))
    installed = {path.name for entry in sys.path for path in Path(entry or ".").glob("*.dist-info")}
    return {
        "moec": moec.__version__,
        "code": sha256_of_chunks(path.read_bytes() for path in modules),
        "python": sys.version_info[:3],
        "installed": sorted(installed),
    }


def _states(directory: Path) -> dict[str, list[int]]:
    """File -> size and time of last change, which are cheap to compare for files of any size."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): [(found := path.stat()).st_size, found.st_mtime_ns] for path in files
    }


def _same(output: Path, artifact: Path) -> bool:
    """Whether `output` is this artifact already, apart from its reports."""
    if not is_artifact(output) or not (output / JSON).is_file():
        return False
    found, wanted = (
        {name: state for name, state in _states(place).items() if name not in REPORTS} for place in (output, artifact)
    )
    return found == wanted


def _link(source: Path, destination: Path) -> None:
    """Link the files of `source` into `destination`; reports are copied, since `moec validate` rewrites them."""

    def transfer(first: str, second: str) -> str:
        if Path(first).name not in REPORTS:
            try:
                os.link(first, second)
            except OSError:
                return str(shutil.copy2(first, second))
            return second
        return str(shutil.copy2(first, second))

    shutil.copytree(source, destination, copy_function=transfer, dirs_exist_ok=True)
