"""`moec publish`: put a verified artifact into a registry, with its version, digests and verdicts.

A registry is a directory, an MLflow tracking server or the Hugging Face Hub. A directory has this layout:

```
REGISTRY/NAME/index.json  VERSION/<the artifact>
```
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moec.compiler.build import hub
from moec.compiler.build.model_card import CardMetadata, model_card
from moec.compiler.common.artifact import leads_out, read_manifest, verify
from moec.compiler.common.errors import ArtifactError, MissingExtraError, OutputError, UsageError, first_line
from moec.compiler.common.files import read_json, write_atomically
from moec.compiler.common.staging import staged
from moec.compiler.common.validation import unknown
from moec.compiler.report.schema import Report, read_report

INDEX = "index.json"


class _Version(BaseModel):
    model_config = ConfigDict(extra="allow")

    version: str


class _Index(BaseModel):
    """index.json of a model in a directory."""

    versions: list[_Version]


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
        if text is not None and (not text or text.startswith(".") or set(text) & set("/\\:")):
            raise UsageError(
                f"--{what}: {text!r} is not allowed", hint="it must not have /, \\ or :, or begin with a dot"
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
    version, shelf = order.version, Path(order.where()).expanduser().resolve() / order.name
    index = _read_index(shelf)
    numbers = [int(entry["version"]) for entry in index if entry["version"].isdigit()]
    if version is not None and (shelf / version).exists():
        raise OutputError(
            f"{shelf}: version {version} exists already",
            hint=f"give another version with --as, or omit it to get {max(numbers, default=0) + 1}",
        )
    version = version or str(max(numbers, default=0) + 1)
    with staged(shelf / version) as place:
        for name, path in order.files().items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place / name)
    entries = [entry for entry in index if entry["version"] != version]
    _write_index(shelf, [*entries, {"version": version, **order.metadata}])
    return {"version": version, "location": str(shelf / version)}


def _read_index(shelf: Path) -> list[dict[str, Any]]:
    path = shelf / INDEX
    if not path.exists():
        return []
    hint = "restore the file, or give another registry"
    content = read_json(path, OutputError, hint=hint)
    try:
        return [entry.model_dump() for entry in _Index.model_validate(content).versions]
    except ValidationError as error:
        raise OutputError(f"{path}: damaged: {first_line(error)}", hint=hint) from error


def _write_index(shelf: Path, entries: list[dict[str, Any]]) -> None:
    try:
        write_atomically(shelf / INDEX, json.dumps({"schema_version": 1, "versions": entries}, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{shelf}: cannot be written: {error.strerror or error}") from error


def _to_mlflow(order: Publication) -> dict[str, Any]:
    registry, name, metadata = order.where(), order.name, order.metadata
    if order.version is not None:
        raise UsageError("--as: MLflow numbers versions itself", hint="omit --as")
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtraError("mlflow is not installed", hint="pip install 'moec[mlflow]'")
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        client = mlflow.MlflowClient(tracking_uri=registry, registry_uri=registry)
        experiment = client.get_experiment_by_name(name)
        run = client.create_run(
            experiment.experiment_id if experiment else client.create_experiment(name), tags={"moec": "publish"}
        )
        for key, value in _tags(metadata):
            client.set_tag(run.info.run_id, key, value)
        client.log_metric(run.info.run_id, "bytes", metadata["bytes"])
        client.log_artifacts(run.info.run_id, str(order.directory), "artifact")
        if not any(model.name == name for model in client.search_registered_models(f"name='{name}'")):
            client.create_registered_model(name)
        source = f"{run.info.artifact_uri}/artifact"
        made = client.create_model_version(name, source, run.info.run_id, tags=dict(_tags(metadata)))
        client.set_terminated(run.info.run_id)
    except (MlflowException, ImportError, OSError) as error:
        # File and database URIs need the full mlflow package, and some are refused; a server always works.
        hint = "" if registry.startswith(("http://", "https://")) else "mlflow server --backend-store-uri ..., then "
        raise OutputError(
            f"{registry}: MLflow refuses: {first_line(error)}",
            hint=f"{hint}give the address of a tracking server, such as --registry http://127.0.0.1:5000",
        ) from error
    return {"version": str(made.version), "location": source}


def _tags(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The metadata as MLflow tags, which are flat and limited in length."""
    yield "moec.digest", metadata["digest"]
    yield "moec.proven", metadata["proven"]
    for gate, status in metadata["gates"].items():
        yield f"moec.gate.{gate.replace(':', '').replace(' ', '_')}", status
    for name, digest in metadata["source"].items():
        yield f"moec.source.{name}", digest
    for name, tool in metadata["tools"].items():
        yield f"moec.tool.{name}", tool
    yield "moec.recipe", json.dumps(metadata["recipe"], sort_keys=True)[:4500]


def _to_hub(order: Publication) -> dict[str, Any]:
    tag, endpoint = order.version, order.registry
    return hub.push(order.files(), order.card, order.name, tag=tag, endpoint=endpoint, public=order.public)


HUB = "hub"
REGISTRIES: Mapping[str, Registry] = {"dir": _to_directory, "mlflow": _to_mlflow, HUB: _to_hub}
