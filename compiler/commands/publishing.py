"""`moec publish`: artifacts in a registry, and the aliases by which their versions are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from moec.compiler.commands.options import ArtifactDirectory, OutputConsole

RegistryPlace = Annotated[str, typer.Argument(metavar="REGISTRY", help="The directory, or MLflow's tracking URI.")]
Note = Annotated[str, typer.Option(help="Why, for the history.")]


def publish(
    console: OutputConsole,
    directory: ArtifactDirectory,
    to: Annotated[str, typer.Option(metavar="dir|mlflow|hub", help="Kind of the registry.")],
    name: Annotated[str, typer.Option(help="Name of the model in the registry; OWNER/NAME for the Hub.")],
    registry: Annotated[
        str | None,
        typer.Option(metavar="PATH|URI", help="The directory, MLflow's tracking URI, or another Hub than the usual."),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option("--as", help="Version: of dir (default: the next number), or a tag of the Hub (default: none)."),
    ] = None,
    allow_failed: Annotated[bool, typer.Option("--allow-failed", help="Publish even if a gate failed.")] = False,
    public: Annotated[bool, typer.Option("--public", help="hub: make a new repository public.")] = False,
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="hub: the model that was compiled, for the model card.")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="hub: the license, for the model card.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and show the model card only.")] = False,
) -> int:
    """Put an artifact into a registry, with its version, digests and verdicts; the word 'add' may be omitted."""
    from moec.compiler.build.model_card import CardMetadata
    from moec.compiler.build.publish import publish as put
    from moec.compiler.report.describe import size_text

    found = put(
        directory,
        to,
        registry,
        name,
        version=version,
        allow_failed=allow_failed,
        public=public,
        card=CardMetadata(base_model, license_id) if base_model or license_id else None,
        dry_run=dry_run,
    )

    def show() -> None:
        if not dry_run:
            console.line(f"{found['name']} {found['version']}: {found['location']}")
            return
        console.rows([(place, size_text(size)) for place, size in found["files"].items()], header=("file", "size"))
        if "card" in found:
            console.line("")
            console.line(found["card"])

    console.result(found, show)
    return 0


def list_versions(
    console: OutputConsole,
    registry: RegistryPlace,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A model; all if none is named.")] = None,
    history: Annotated[bool, typer.Option("--history", help="List the changes of the aliases too.")] = False,
) -> int:
    """List the versions of every model of a registry, with their aliases and verdicts."""
    from moec.compiler.build.publish import registry_at

    place = registry_at(registry)
    found = {model: place.describe(model) for model in ([name] if name else place.names())}

    def show() -> None:
        rows = [row for model, facts in found.items() for row in _version_rows(model, facts)]
        console.rows(rows, header=("model", "version", "aliases", "size", "gates", "proven"))
        events = [(model, event) for model, facts in found.items() for event in facts["history"]]
        if history and events:
            console.line("")
            console.rows([_event_row(*item) for item in events], header=("time", "who", "", "alias", "version", "note"))

    console.result({"models": found}, show)
    return 0


def _version_rows(model: str, facts: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    from moec.compiler.report.describe import size_text

    rows = []
    for entry in facts["versions"]:
        named = ", ".join(alias for alias, version in facts["aliases"].items() if version == entry["version"])
        failed = [gate for gate, status in entry["gates"].items() if status == "fail"]
        passed = sum(status == "pass" for status in entry["gates"].values())
        gates = f"failed: {', '.join(failed)}" if failed else f"{passed} passed"
        rows.append((model, entry["version"], named, size_text(entry["bytes"]), gates, entry["proven"]))
    return rows


def _event_row(model: str, event: Mapping[str, Any]) -> tuple[str, ...]:
    change = event["version"] if event["replaced"] is None else f"{event['replaced']} -> {event['version']}"
    return (event["time"], event["by"], event["action"], f"{model}@{event['alias']}", change, event["note"])


def promote(
    console: OutputConsole,
    registry: RegistryPlace,
    wanted: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="A version of a model.")],
    alias: Annotated[str, typer.Option("--as", help="The alias, such as prod.")],
    note: Note = "",
    allow_failed: Annotated[bool, typer.Option("--allow-failed", help="Promote even if a gate failed.")] = False,
) -> int:
    """Let an alias such as 'prod' name a version; REGISTRY/NAME@prod then stands for its artifact."""
    from moec.compiler.build import aliases
    from moec.compiler.build.publish import registry_at

    name, version = aliases.split(wanted)
    event = registry_at(registry).promote(name, version, alias, note=note, allow_failed=allow_failed)
    found = {"name": name, "alias": alias, "version": version, "changed": event is not None}
    said = f"{name}@{alias} is {version}" + (" already" if event is None else _instead(event.replaced))
    console.result({**found, "event": event.model_dump() if event else None}, lambda: console.line(said))
    return 0


def rollback(
    console: OutputConsole,
    registry: RegistryPlace,
    name: Annotated[str, typer.Argument(help="The model.")],
    alias: Annotated[str, typer.Option(help="The alias, such as prod.")],
    note: Note = "",
) -> int:
    """Let an alias name the version that it named before; repeat it to go further back."""
    from moec.compiler.build.publish import registry_at

    event = registry_at(registry).rollback(name, alias, note=note)
    found = {"name": name, "alias": alias, "version": event.version, "event": event.model_dump()}
    said = f"{name}@{alias} is {event.version}{_instead(event.replaced)}"
    console.result(found, lambda: console.line(said))
    return 0


def _instead(replaced: str | None) -> str:
    return "" if replaced is None else f", in place of {replaced}"


TITLE = "Put an artifact into a registry; list, promote and roll back the versions there."
COMMANDS: Mapping[str, Callable[..., int]] = {
    "add": publish,
    "list": list_versions,
    "promote": promote,
    "rollback": rollback,
}
"""Name -> command; the first needs no name."""
