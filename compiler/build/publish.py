"""`moec publish`: put a verified artifact into a registry, with its version, digests and verdicts.

A registry is a directory (`registry`), an MLflow tracking server (`mlflow_server`) or the Hugging Face Hub (`hub`). In
the first two, aliases such as `prod` name the versions that are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.compiler.build import hub
from moec.compiler.build.aliases import FORBIDDEN
from moec.compiler.build.mlflow_server import MlflowRegistry
from moec.compiler.build.model_card import CardMetadata, model_card
from moec.compiler.build.registry import DirectoryRegistry
from moec.compiler.common.artifact import leads_out, read_manifest, verify
from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.common.validation import unknown
from moec.compiler.report.schema import Report, read_report


@dataclass(frozen=True)
class Publication:
    """An artifact that may be published, and where to.

    Attributes:
        directory: The artifact.
        name: Name of the model.
        version: Version; None lets the registry choose.
        registry: Directory or address of the registry; None: the usual one.
        metadata: What the registry stores with the files.
        card: The model card; only the Hub has one.
        public: Whether a new repository of the Hub is public.
    """

    directory: Path
    name: str
    version: str | None
    registry: str | None
    metadata: Mapping[str, Any]
    card: str = ""
    public: bool = False

    def files(self) -> dict[str, Path]:
        """Name -> file, without links that lead out of the artifact, sorted by name."""
        paths = sorted(path for path in self.directory.rglob("*") if path.is_file())
        inside = (path for path in paths if not leads_out(self.directory, path))
        return {path.relative_to(self.directory).as_posix(): path for path in inside}

    def where(self) -> str:
        """The registry.

        Raises:
            UsageError: None is given.
        """
        if self.registry is None:
            raise UsageError("--registry is missing", hint="give the directory, or MLflow's tracking URI")
        return self.registry


Registry = Callable[[Publication], dict[str, Any]]


def publish(
    directory: Path,
    to: str,
    registry: str | None,
    name: str,
    *,
    version: str | None = None,
    allow_failed: bool = False,
    public: bool = False,
    card: CardMetadata | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Put an artifact into a registry.

    Args:
        directory: The artifact.
        to: A name in `REGISTRIES`.
        registry: Directory or address of the registry; for the Hub, None means the usual one.
        name: Name of the model; for the Hub, OWNER/NAME.
        version: Version; None: the next number, or for the Hub the commit.
        allow_failed: Whether to accept an artifact of which a gate failed or no gate has run.
        public: Whether a new repository of the Hub is public.
        card: What the model card of the Hub says beyond the artifact.
        dry_run: Whether to check everything that needs no registry, and publish nothing.

    Returns:
        `name`, `version`, `location` and the stored `metadata`. After a dry run `name`, `files` (name -> bytes),
        `metadata`, and for the Hub `card`, the text of README.md there.

    Raises:
        ArtifactError: The artifact is damaged, or a gate failed.
        UsageError: The kind of registry is unknown, or `name` or `version` has invalid characters.
        OutputError: The registry cannot be written, or has this version already.
        MissingExtraError: MLflow is not installed.
    """
    if to not in REGISTRIES:
        raise unknown(to, REGISTRIES, "unknown registry", "the registries")
    _check_names(to, name, version)
    if to != HUB and (public or card is not None):
        raise UsageError("--public, --base-model and --license are for --to hub", hint="omit them")
    verify(directory)
    report = read_report(directory)
    if not allow_failed:
        _check_gates(directory, report)
    manifest = read_manifest(directory)
    text = model_card(manifest, report, name, card or CardMetadata()) if to == HUB else ""
    metadata = _metadata(manifest, report)
    publication = Publication(directory, name, version, registry, metadata, text, public)
    if not dry_run:
        return {"name": name, **REGISTRIES[to](publication), "metadata": metadata}
    sizes = {place: path.stat().st_size for place, path in publication.files().items()}
    return {"name": name, "files": sizes, "metadata": metadata, **({"card": text} if text else {})}


def _check_names(to: str, name: str, version: str | None) -> None:
    """Check the name of the model and the version.

    Raises:
        UsageError: One of them has invalid characters.
    """
    parts = name.split("/") if to == HUB else [name]
    if to == HUB and len(parts) != 2:
        raise UsageError(f"--name: {name!r} is not a repository of the Hub", hint="give OWNER/NAME")
    for what, text in (*(("name", part) for part in parts), ("as", version)):
        if text is not None and (not text or text.startswith(".") or set(text) & FORBIDDEN):
            raise UsageError(
                f"--{what}: {text!r} is not allowed", hint="it must not have /, \\, : or @, or begin with a dot"
            )


def _check_gates(directory: Path, report: Report) -> None:
    failed = [verdict.gate for verdict in report.verdicts if verdict.status == "fail"]
    if failed or not any(verdict.status == "pass" for verdict in report.verdicts):
        what = f"failed: {', '.join(failed)}" if failed else "no gate has run"
        raise ArtifactError(
            f"{directory}: not published: {what}",
            hint="build it again, or pass --allow-failed to publish it nevertheless",
        )


def _metadata(manifest: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The metadata that a registry stores with the files."""
    return {
        "digest": manifest["digest"],
        "files": manifest["files"],
        "source": manifest.get("source", {}).get("digests", {}),
        "recipe": manifest.get("recipe", {}),
        "tools": manifest.get("tools", {}),
        "gates": {verdict.gate: str(verdict.status) for verdict in report.verdicts},
        "proven": report.created,
        "bytes": sum(report.files.values()),
    }


def _to_directory(order: Publication) -> dict[str, Any]:
    return dict(DirectoryRegistry(Path(order.where()).expanduser().resolve()).add(order))


def _to_mlflow(order: Publication) -> dict[str, Any]:
    return dict(MlflowRegistry(order.where()).add(order))


def _to_hub(order: Publication) -> dict[str, Any]:
    tag, endpoint = order.version, order.registry
    return hub.push(order.files(), order.card, order.name, tag=tag, endpoint=endpoint, public=order.public)


def registry_at(location: str) -> DirectoryRegistry | MlflowRegistry:
    """The registry at a place: an address with a scheme, such as http://, is MLflow's, and all else is a directory."""
    return MlflowRegistry(location) if "://" in location else DirectoryRegistry(Path(location).expanduser().resolve())


HUB = "hub"
REGISTRIES: Mapping[str, Registry] = {"dir": _to_directory, "mlflow": _to_mlflow, HUB: _to_hub}
