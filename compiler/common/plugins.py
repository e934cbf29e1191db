"""Classes that third-party packages register in the entry-point groups of moec."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar, Protocol, TypeVar

from moec.compiler.common.errors import UsageError


class Named(Protocol):
    """A class with a unique `name`."""

    name: ClassVar[str]


Plugin = TypeVar("Plugin", bound=Named)


def load_plugins(
    group: str, base: type[Plugin], taken: Collection[str], extra: Iterable[EntryPoint] | None = None
) -> dict[str, type[Plugin]]:
    """The classes that third parties register in a group: name -> class, sorted by name.

    Args:
        group: The entry-point group, such as `moec.passes`.
        base: Each entry point must refer to a subclass of this whose `name` is the name of the entry.
        taken: Names that an entry point may not claim.
        extra: The entry points; None: those installed in the group.

    Raises:
        UsageError: An entry point claims a name that is taken, or does not refer to such a class.
    """
    kind = base.__name__
    found: dict[str, type[Plugin]] = {}
    for entry in sorted(_installed(group) if extra is None else extra, key=lambda e: (e.name, e.value)):
        where = f"the entry point {entry.name} = {entry.value} of group {group}"
        if entry.name in taken or entry.name in found:
            raise UsageError(
                f"{where} claims a name that is taken",
                hint=f"uninstall one of the packages, or rename the {kind.lower()}",
            )
        loaded = entry.load()
        if not (isinstance(loaded, type) and issubclass(loaded, base) and loaded.name == entry.name):
            raise UsageError(
                f"{where} does not refer to a {kind} of that name",
                hint=f"it must name a subclass of {base.__module__}.{kind} whose `name` is the entry's",
            )
        found[entry.name] = loaded
    return found


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    """Asked once, as the metadata of every installed package is read."""
    return tuple(entry_points(group=group))
