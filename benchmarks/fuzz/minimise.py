"""Makes a build that is a fault simpler, as long as it ends in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuzz.campaign import Row, repeat


def minimised(row: Row, work: Path) -> Row:
    """The simplest row that is found by taking away one change or one key of the recipe after the other."""
    tried = True
    while tried:
        tried = False
        for simpler in _simpler(row):
            try:
                found = repeat(simpler, work)
            except Exception:  # noqa: BLE001 - transformers takes no such model
                continue
            if _same(found, row):
                row, tried = found, True
                break
    return row


def _same(first: Row, second: Row) -> bool:
    """Whether two rows are the same fault: the outcome, and what the cause begins with."""
    return first.outcome.outcome == second.outcome.outcome and _kind(first) == _kind(second)


def _kind(row: Row) -> str:
    return row.outcome.cause.partition(":")[0]


def _simpler(row: Row) -> Iterator[Row]:
    """Rows with one change of the architecture or one part of the recipe less."""
    for key in row.architecture.changes:
        left = {name: value for name, value in row.architecture.changes.items() if name != key}
        yield replace(row, architecture=replace(row.architecture, changes=left))
    if row.architecture.dtype != "float32":
        yield replace(row, architecture=replace(row.architecture, dtype="float32"))
    for recipe in _parts(row.recipe):
        yield replace(row, recipe=recipe)


def _parts(recipe: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The recipe without one of its keys, of its options, or of the formats of a plan."""
    for key in recipe.keys() - {"target", "options"}:
        yield {name: value for name, value in recipe.items() if name != key}
    for section in ("options", "routing", "quantize"):
        for key in recipe.get(section, {}):
            left = {name: value for name, value in recipe[section].items() if name != key}
            if left or section == "options":
                yield {**recipe, section: left}
    wanted = recipe.get("quantize", {}).get("format")
    if isinstance(wanted, dict):
        for key in wanted["formats"]:
            formats = {name: value for name, value in wanted["formats"].items() if name != key}
            yield {**recipe, "quantize": {**recipe["quantize"], "format": {**wanted, "formats": formats}}}
