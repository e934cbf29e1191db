"""MLflow: its model registry as a registry of artifacts, and its runs as a log of searches.

MLflow keeps what an alias names, but not what it named before. So every change of an alias is also a tag of the
registered model, one per event, and writers that come at the same time overwrite nothing of each other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from moec.compiler.build import aliases
from moec.compiler.build.aliases import Event
from moec.compiler.common.errors import MissingExtraError, OutputError, UsageError, first_line
from moec.compiler.common.validation import unknown

if TYPE_CHECKING:
    from moec.compiler.build.publish import Publication

EVENT, GATE = "moec.alias.", "moec.gate."
"""Prefixes of tags: an event of an alias, and the status of a gate."""


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    """Yield a client of a tracking server.

    Raises:
        MissingExtraError: MLflow is not installed.
        OutputError: MLflow refuses what is done in the block.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtraError("mlflow is not installed", hint="pip install 'moec[mlflow]'")
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        yield mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, ImportError, OSError) as error:
        # File and database URIs need the full mlflow package, and some are refused; a server always works.
        hint = "" if uri.startswith(("http://", "https://")) else "mlflow server --backend-store-uri ..., then "
        raise OutputError(
            f"{uri}: MLflow refuses: {first_line(error)}",
            hint=f"{hint}give the address of a tracking server, such as --registry http://127.0.0.1:5000",
        ) from error


def begin_run(client: Any, experiment: str, kind: str) -> Any:
    """A new run of an experiment, which is created if it does not exist; `kind` is its tag `moec`."""
    known = client.get_experiment_by_name(experiment)
    return client.create_run(
        known.experiment_id if known else client.create_experiment(experiment), tags={"moec": kind}
    )


@dataclass(frozen=True)
class MlflowRegistry:
    """The model registry of the tracking server at `uri`."""

    uri: str

    def add(self, order: Publication) -> dict[str, str]:
        """Log an artifact as a run and make a model version of it; return its `version` and `location`.

        Raises:
            UsageError: A version is given.
            OutputError: MLflow refuses.
        """
        name, metadata = order.name, order.metadata
        if order.version is not None:
            raise UsageError("--as: MLflow numbers versions itself", hint="omit --as")
        with connected(self.uri) as client:
            run = begin_run(client, name, "publish")
            for key, value in _tags(metadata):
                client.set_tag(run.info.run_id, key, value)
            client.log_metric(run.info.run_id, "bytes", metadata["bytes"])
            client.log_artifacts(run.info.run_id, str(order.directory), "artifact")
            if name not in _names(client):
                client.create_registered_model(name)
            source = f"{run.info.artifact_uri}/artifact"
            made = client.create_model_version(name, source, run.info.run_id, tags=dict(_tags(metadata)))
            client.set_terminated(run.info.run_id)
        return {"version": str(made.version), "location": source}

    def names(self) -> list[str]:
        """Names of all models, sorted."""
        with connected(self.uri) as client:
            return _names(client)

    def describe(self, name: str) -> dict[str, Any]:
        """See `DirectoryRegistry.describe`."""
        with connected(self.uri) as client:
            model = self._model(client, name)
            return {
                "versions": [_facts(item) for item in _versions(client, name)],
                "aliases": _aliases(model),
                "history": [event.model_dump() for event in _events(model)],
            }

    def promote(self, name: str, version: str, alias: str, *, note: str, allow_failed: bool) -> Event | None:
        """See `DirectoryRegistry.promote`."""
        with connected(self.uri) as client:
            model = self._model(client, name)
            found = {str(item.version): item for item in _versions(client, name)}
            aliases.check_alias(alias, found)
            if version not in found:
                raise unknown(version, found, f"{name}: unknown version", "its versions")
            if not allow_failed:
                aliases.check_proven(name, version, _facts(found[version])["gates"].items())
            event = aliases.promotion(_settled(model, alias), alias, version, note)
            if event is not None:
                _record(client, name, event)
        return event

    def rollback(self, name: str, alias: str, *, note: str) -> Event:
        """See `DirectoryRegistry.rollback`."""
        with connected(self.uri) as client:
            event = aliases.rollback(_settled(self._model(client, name), alias), name, alias, note)
            _record(client, name, event)
        return event

    def _model(self, client: Any, name: str) -> Any:
        known = _names(client)
        if name not in known:
            raise unknown(name, known, f"{self.uri}: unknown model", "the models there")
        return client.get_registered_model(name)


def _names(client: Any) -> list[str]:
    names, token = [], None
    while True:
        page = client.search_registered_models(page_token=token)
        names += [model.name for model in page]
        token = page.token
        if not token:
            return sorted(names)


def _versions(client: Any, name: str) -> list[Any]:
    return sorted(client.search_model_versions(f"name='{name}'"), key=lambda item: int(item.version))


def _aliases(model: Any) -> dict[str, str]:
    return {alias: str(version) for alias, version in sorted(dict(model.aliases).items())}


def _events(model: Any) -> list[Event]:
    """The events of a registered model, in the order of their times."""
    found = []
    for key, value in sorted(dict(model.tags).items()):
        if key.startswith(EVENT):
            with contextlib.suppress(ValidationError):  # a tag that somebody else has set or changed
                found.append(Event.model_validate_json(value))
    return found


def _settled(model: Any, alias: str) -> list[Event]:
    """The events, and one more if somebody has set the alias in MLflow itself since the last of them."""
    events, now = _events(model), _aliases(model).get(alias)
    before = aliases.current(events).get(alias)
    if now is None or now == before:
        return events
    return [*events, Event.now(action="promote", alias=alias, version=now, replaced=before)]


def _record(client: Any, name: str, event: Event) -> None:
    client.set_registered_model_alias(name, event.alias, event.version)
    client.set_registered_model_tag(name, f"{EVENT}{time.time_ns():020d}", event.model_dump_json())


def _facts(version: Any) -> dict[str, Any]:
    tags = dict(version.tags)
    gates = {key.removeprefix(GATE): value for key, value in tags.items() if key.startswith(GATE)}
    return {
        "version": str(version.version),
        "digest": tags.get("moec.digest", ""),
        "gates": gates,
        "bytes": int(tags.get("moec.bytes", 0)),
        "proven": tags.get("moec.proven", ""),
    }


def _tags(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The metadata as MLflow tags, which are flat and limited in length."""
    yield "moec.digest", metadata["digest"]
    yield "moec.proven", metadata["proven"]
    yield "moec.bytes", str(metadata["bytes"])
    for gate, status in metadata["gates"].items():
        yield f"{GATE}{gate.replace(':', '').replace(' ', '_')}", status
    for name, digest in metadata["source"].items():
        yield f"moec.source.{name}", digest
    for name, tool in metadata["tools"].items():
        yield f"moec.tool.{name}", tool
    yield "moec.recipe", json.dumps(metadata["recipe"], sort_keys=True)[:4500]
