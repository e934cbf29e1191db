"""Deployment targets by name. A new target is one folder and one line in the table below."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from moec.compiler.common.errors import MissingExtraError, UsageError
from moec.compiler.common.validation import unknown

if TYPE_CHECKING:
    from moec.targets.base import Target

GROUP = "moec.targets"
"""Entry-point group through which other packages add targets: name = "package.module:TargetClass"."""

_BUILT_IN: Mapping[str, str] = {
    "coreml": "moec.targets.coreml.target:CoremlTarget",
    "onnx": "moec.targets.onnx.target:OnnxTarget",
    "tensorrt": "moec.targets.tensorrt.target:TensorrtTarget",
    "tflite": "moec.targets.tflite.target:TfliteTarget",
}


def target_names() -> tuple[str, ...]:
    """Sorted names of all targets, including those of other packages. Imports none of them.

    Raises:
        UsageError: Two packages provide the same name.
    """
    return tuple(sorted(_table()))


def get_target(name: str) -> Target:
    """Import and construct the target called `name`.

    Raises:
        UsageError: No target has this name (the hint gives the nearest one), or two packages provide the same name.
        MissingExtraError: The package that provides the target cannot be imported.
    """
    table = _table()
    if name not in table:
        raise unknown(name, table, "unknown target", "the targets")
    entry = table[name]
    try:
        target_class: type[Target] = entry.load()
    except ImportError as error:
        owner = entry.dist.name if entry.dist else "moec"
        raise MissingExtraError(
            f"target '{name}' of {owner} cannot be imported: {error}", hint=f"pip install --upgrade {owner}"
        ) from error
    return target_class()


@cache
def _table() -> Mapping[str, EntryPoint]:
    importlib.invalidate_caches()
    table = {name: EntryPoint(name, value, GROUP) for name, value in _BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        if entry.name in table:
            owners = sorted(e.dist.name if e.dist else "moec" for e in (entry, table[entry.name]))
            raise UsageError(
                f"target '{entry.name}' is provided twice, by {' and '.join(owners)}",
                hint=f"uninstall one of them: moec never lets one target replace another ({entry.value})",
            )
        table[entry.name] = entry
    return table
