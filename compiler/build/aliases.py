"""Aliases of the versions of a model, such as `prod`, as a history of events, from which follows what an alias names.

A promotion puts a version on the stack of its alias, a rollback takes the last one off; the alias names the top.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.common.validation import unknown

FORBIDDEN = frozenset("/\\:@")
"""Characters that names, versions and aliases must not have, since paths, addresses and NAME@VERSION use them."""


class Event(BaseModel):
    """One change of an alias."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time: str = Field(description="UTC, ISO 8601.")
    by: str = Field(description="user@host.")
    action: Literal["promote", "rollback"]
    alias: str
    version: str = Field(description="The version that the alias names from now on.")
    replaced: str | None = Field(default=None, description="The version that it named before.")
    note: str = Field(default="", description="Why, in the words of who did it.")

    @classmethod
    def now(cls, **fields: Any) -> Event:
        """An event of this moment by this user."""
        return cls(time=datetime.now(UTC).isoformat(timespec="seconds"), by=_who(), **fields)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def stack(events: Iterable[Event], alias: str) -> list[str]:
    """The versions that an alias would name after rollbacks, and the one that it names, which is last."""
    found: list[str] = []
    for event in events:
        if event.alias == alias and event.action == "promote":
            found.append(event.version)
        elif event.alias == alias:
            del found[-1:]
    return found


def current(events: Sequence[Event]) -> dict[str, str]:
    """Alias -> the version that it names."""
    stacks = {alias: stack(events, alias) for alias in sorted({event.alias for event in events})}
    return {alias: versions[-1] for alias, versions in stacks.items() if versions}


def promotion(events: Sequence[Event], alias: str, version: str, note: str = "") -> Event | None:
    """The event that lets an alias name a version; None if it does so already."""
    before = current(events).get(alias)
    if before == version:
        return None
    return Event.now(action="promote", alias=alias, version=version, replaced=before, note=note)


def rollback(events: Sequence[Event], model: str, alias: str, note: str = "") -> Event:
    """The event that lets an alias name the version before the present one.

    Raises:
        UsageError: The model has no such alias, or the alias has named one version only.
    """
    versions = stack(events, alias)
    if not versions:
        raise unknown(alias, current(events), f"{model} has no alias", "its aliases")
    if len(versions) == 1:
        raise UsageError(
            f"{model}@{alias} has no history: {versions[0]} is the only version that it has named",
            hint=f"name another one: moec publish promote REGISTRY {model}@VERSION --as {alias}",
        )
    return Event.now(action="rollback", alias=alias, version=versions[-2], replaced=versions[-1], note=note)


def check_alias(alias: str, versions: Iterable[str]) -> None:
    """Check the name of an alias.

    Raises:
        UsageError: It has invalid characters, or is the name of a version.
    """
    if not alias or alias.startswith(".") or set(alias) & FORBIDDEN:
        raise UsageError(
            f"--as: {alias!r} is not allowed", hint="it must not have /, \\, : or @, or begin with a dot; such as prod"
        )
    if alias in versions or alias.isdigit():
        raise UsageError(
            f"--as: {alias!r} is the name of a version, so it cannot be an alias", hint="give a name such as prod"
        )


def check_proven(model: str, version: str, gates: Iterable[tuple[str, str]]) -> None:
    """Refuse to promote what is not proven.

    Args:
        model: Name of the model.
        version: The version.
        gates: Name and status of each gate, as they were published.

    Raises:
        ArtifactError: A gate failed or none has passed.
    """
    every = list(gates)
    failed = [name for name, status in every if status == "fail"]
    if failed or not any(status == "pass" for _, status in every):
        what = f"failed: {', '.join(failed)}" if failed else "no gate has passed"
        raise ArtifactError(
            f"{model}@{version}: not promoted: {what}",
            hint="publish a version that is proven, or pass --allow-failed to promote it nevertheless",
        )


def split(wanted: str) -> tuple[str, str]:
    """Name and version of NAME@VERSION.

    Raises:
        UsageError: It has not this form.
    """
    name, _, version = wanted.rpartition("@")
    if not name or not version:
        raise UsageError(f"{wanted!r} is not NAME@VERSION", hint="such as olmoe@3; 'moec publish list' shows versions")
    return name, version
