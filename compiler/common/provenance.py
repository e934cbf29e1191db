"""provenance.json: where an artifact comes from, as an in-toto Statement with a SLSA Provenance predicate.

Statement v1: https://in-toto.io/Statement/v1; predicate: https://slsa.dev/spec/v1.0/provenance. Everything in it
follows from moec.json, so it is byte-identical on every rebuild, and `check` compares it with moec.json. It holds no
times: those of the build are in report.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.common.artifact import MANIFEST, leads_out, read_manifest
from moec.compiler.common.digest import sha256_of_file
from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.files import read_json

FILE = "provenance.json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "pkg:pypi/moec#export/v1"
"""Names the meaning of `externalParameters`: the recipe, as moec.json records it."""
_HINT = "copy it again, or export it again"


def statement(manifest: Mapping[str, Any], manifest_digest: str) -> dict[str, Any]:
    """The Statement about an artifact.

    Args:
        manifest: The content of moec.json.
        manifest_digest: sha256 of the file moec.json.
    """
    tools = dict(sorted(manifest.get("tools", {}).items()))
    version = tools.get("moec")
    files = {**manifest["files"], MANIFEST: manifest_digest}
    return {
        "_type": STATEMENT,
        "subject": _descriptors(files),
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": manifest.get("recipe", {})},
                "internalParameters": {"routing": manifest.get("routing", {})},
                "resolvedDependencies": _descriptors(manifest.get("source", {}).get("digests", {})),
            },
            "runDetails": {
                "builder": {"id": f"pkg:pypi/moec@{version}" if version else "pkg:pypi/moec", "version": tools}
            },
        },
    }


def _descriptors(digests: Mapping[str, str]) -> list[dict[str, Any]]:
    """in-toto ResourceDescriptors of files."""
    return [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())]


def write(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write provenance.json into an artifact whose moec.json is written.

    Args:
        directory: The artifact.
        manifest: The content of its moec.json.
    """
    content = statement(manifest, sha256_of_file(directory / MANIFEST))
    (directory / FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check(directory: Path) -> bool:
    """Check that provenance.json agrees with moec.json.

    Returns:
        Whether the artifact has a provenance.json; those of earlier versions do not.

    Raises:
        ArtifactError: provenance.json is damaged, or describes another artifact.
    """
    path = directory / FILE
    if not path.is_file():
        return False
    if leads_out(directory, path):
        raise ArtifactError(f"{path}: a link that leads out of the artifact", hint=_HINT)
    found = read_json(path, ArtifactError, hint=_HINT)
    if found != statement(read_manifest(directory), sha256_of_file(directory / MANIFEST)):
        raise ArtifactError(f"{path}: it does not describe this artifact: it differs from {MANIFEST}", hint=_HINT)
    return True
