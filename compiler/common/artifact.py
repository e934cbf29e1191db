"""The artifact directory, its description moec.json, and the digests that verify it.

```
out/ moec.json  report.json  report.html  <model files of the target>  config.json  tokenizer files ...
```
moec.json hashes every file but itself, the reports and README.md, and carries its own digest. It holds no time, no
measurement and no path, so that two exports of one recipe are byte-identical.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moec.compiler.common import sections
from moec.compiler.common.digest import sha256_of_file, sha256_of_text
from moec.compiler.common.errors import ArtifactError, first_line
from moec.compiler.common.files import read_json

MANIFEST = "moec.json"
REPORTS = frozenset({"report.json", "report.html", "report.xml", "build.log", "README.md"})
"""Files with measurements, and README.md, which is a model card in some registries. They may be rewritten at any time,
so moec.json does not hash them."""

SCHEMA_VERSION = 1


class _Packed(BaseModel):
    """Types of the section `packed`, see `moec.compiler.run.packed_cache.description`."""

    model_config = ConfigDict(strict=True)

    bytes: int
    runtime: str
    cpu: str
    instruction_set: list[str]
    source: str


class _Pass(BaseModel):
    """The log of one pass."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    modified: bool = False
    rejections: list[dict[str, Any]] = []


class _Sections(BaseModel):
    """Types of the sections of moec.json. Only `files` is required."""

    model_config = ConfigDict(extra="allow", strict=True)

    files: dict[str, str]
    source: sections.Source = sections.Source()
    recipe: sections.RecordedRecipe = sections.RecordedRecipe()
    model: sections.Model = sections.Model()
    passes: list[_Pass] = []
    rejections: list[dict[str, Any]] = []
    signature: dict[str, Any] = {}
    routing: sections.Routing = sections.Routing()
    quantization: sections.Quantization = sections.Quantization()
    model_files: list[str] = []
    facts: sections.Facts = sections.Facts()
    tensor_bytes: dict[str, sections.Count] = {}
    tools: dict[str, str] = {}
    packed: _Packed | None = None


def write_manifest(directory: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Hash the files of `directory` and write moec.json, byte for byte the same for the same content and files.

    Args:
        directory: The complete artifact but for moec.json.
        content: The sections of moec.json; `schema_version`, `files` and `digest` are added here.

    Returns:
        The content of moec.json.
    """
    manifest = {"schema_version": SCHEMA_VERSION, **content, "files": _digests(directory)}
    manifest["digest"] = _own_digest(manifest)
    (directory / MANIFEST).write_text(_serialise(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read moec.json and check its own digest, but not the digests of the other files.

    Raises:
        ArtifactError: The directory is not an artifact, or moec.json is damaged or has another schema version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        what = "has no moec.json" if directory.is_dir() else "is not a directory"
        raise ArtifactError(f"{directory}: not an artifact: it {what}", hint="give the directory that moec export made")
    manifest = read_json(path, ArtifactError, hint="export it again")
    if "files" not in manifest:
        raise ArtifactError(f"{path}: not a description of an artifact", hint="export it again")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema version {manifest.get('schema_version')}, this moec reads {SCHEMA_VERSION}",
            hint="use the moec that wrote it, or export it again",
        )
    try:
        digest = _own_digest(manifest)
    except ValueError as error:  # JSON has no infinity, but Python reads one
        raise ArtifactError(f"{path}: damaged: {first_line(error)}", hint="export it again") from error
    if manifest.get("digest") != digest:
        raise ArtifactError(f"{path}: damaged: it does not match its own digest", hint="export it again")
    try:
        _Sections.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']}", hint="export it again") from error
    return manifest


def verify(directory: Path) -> dict[str, str]:
    """Check that every file of an artifact has the digest that moec.json gives.

    Returns:
        File name -> sha256, in the order of names.

    Raises:
        ArtifactError: A file is missing or differs; the message names all of them.
    """
    files: dict[str, str] = read_manifest(directory)["files"]
    problems = []
    for name, digest in sorted(files.items()):
        relative = PurePosixPath(name)
        path = directory / relative
        if relative.is_absolute() or ".." in relative.parts:
            problems.append(f"{name} lies outside of the artifact")
        elif leads_out(directory, path):
            problems.append(f"{name} is a link that leads out of the artifact")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif _sha256(path) != digest:
            problems.append(f"{name} differs from what was built")
    if problems:
        raise ArtifactError(f"{directory}: damaged: {'; '.join(problems)}", hint="copy it again, or export it again")
    return dict(sorted(files.items()))


def leads_out(directory: Path, path: Path) -> bool:
    """Whether `path` resolves to a place outside the artifact."""
    return not path.resolve().is_relative_to(directory.resolve())


def _sha256(path: Path) -> str:
    """Hex digest of a file.

    Raises:
        ArtifactError: It cannot be read.
    """
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    return {name: _sha256(path) for name, path in names.items() if name != MANIFEST and name not in REPORTS}


def _own_digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return sha256_of_text(_serialise(rest))


def _serialise(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)


def is_artifact(directory: Path) -> bool:
    """Whether `directory` has a moec.json; its content is not checked."""
    return os.path.lexists(directory / MANIFEST)
