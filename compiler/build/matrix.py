"""A matrix of builds: models x targets x quantization x routing. Each combination is a cell with its own recipe.

```yaml
models: [allenai/OLMoE-1B-7B-0924, ../golden_models/olmoe-tiny]
targets: [onnx, {target: tflite, options: {context: 512}}]    # a name, or any keys of a recipe
quantize: [none, int8, {format: int4, rounding: rtn}]          # as in a recipe; left out: none
routing: {full: off, lean: {policy: top-p, budget: 0.7}}       # as in a recipe; left out: off
common: {dtype: fp32, quality: {max_loss: 2%}}                 # in every recipe
```

An axis is a list, or a mapping from short names, which then name the cells and their directories.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.compiler.common.errors import UsageError
from moec.compiler.common.files import read_yaml
from moec.compiler.common.validation import unknown
from moec.compiler.pipeline.recipe import Recipe, with_absolute_paths

AXES = ("models", "targets", "quantize", "routing")
_KEYS = (*AXES, "common")
MAX_CELLS = 10_000
_NAME = re.compile(r"[^A-Za-z0-9._]+")


@dataclass(frozen=True)
class Cell:
    """One build.

    Attributes:
        name: Name of the cell and its directory, unique in the matrix.
        fields: The recipe, which is validated when the cell is built, so that an error fails only this cell.
    """

    name: str
    fields: Mapping[str, Any]


def read_matrix(path: Path) -> tuple[Cell, ...]:
    """Read a matrix file.

    Raises:
        UsageError: It cannot be read, has an unknown key or an empty axis, or two cells have the same name.
    """
    content = read_yaml(path, UsageError, hint=f"a matrix is a mapping of the keys {', '.join(_KEYS)}")
    for key in content:
        if key not in _KEYS:
            raise unknown(key, _KEYS, f"{path}: unknown key", "the keys of a matrix")
    for key in AXES[:2]:
        if not content.get(key):
            raise UsageError(f"{path}: no {key} are given", hint=f"{key}: [NAME, ...]")
    common = content.get("common") or {}
    if not isinstance(common, dict) or (odd := [key for key in common if key not in Recipe.model_fields]):
        what = f"unknown recipe key {odd[0]!r}" if isinstance(common, dict) else "not a mapping"
        raise UsageError(f"{path}: common: {what}", hint=f"the keys of a recipe: {', '.join(Recipe.model_fields)}")
    cells = tuple(_cells(content, with_absolute_paths(common, path.parent), path))
    counts = Counter(cell.name for cell in cells)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise UsageError(
            f"{path}: two cells have the name {twice[0]}",
            hint="give names: 'quantize: {a: ..., b: ...}' instead of a list",
        )
    return cells


def _cells(content: Mapping[str, Any], common: Mapping[str, Any], path: Path) -> Iterator[Cell]:
    axes = [list(_axis(content.get(axis), axis, path)) for axis in AXES]
    if (count := math.prod(map(len, axes))) > MAX_CELLS:
        raise UsageError(
            f"{path}: it has {count} cells, and at most {MAX_CELLS} are allowed", hint="split it, or shorten an axis"
        )
    used = [len(axis) > 1 or number < 2 for number, axis in enumerate(axes)]
    for chosen in itertools.product(*axes):
        fields = dict(common)
        for _, part in chosen:
            fields |= part
        yield Cell("-".join(name for (name, _), shown in zip(chosen, used, strict=True) if shown), fields)


def _axis(values: Any, axis: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and recipe keys of every value."""
    if values is None:
        yield "", {}
        return
    if not isinstance(values, list | dict) or not values:
        raise UsageError(
            f"{path}: {axis}: it must be a list or a mapping of names, got {values!r}",
            hint=f"write {axis}: [...], or {axis}: {{NAME: ..., ...}}",
        )
    named = values.items() if isinstance(values, dict) else ((None, value) for value in values)
    for name, value in named:
        part = with_absolute_paths(_part(axis, value), path.parent)
        yield _NAME.sub("-", str(name) if name is not None else _title(value)).strip("-.") or axis, part


def _part(axis: str, value: Any) -> dict[str, Any]:
    if axis == "models":
        return {"checkpoint": value}
    if axis == "targets":
        return dict(value) if isinstance(value, dict) else {"target": value}
    # YAML reads a bare `off` as false, and an empty value as null.
    if value in (None, False, "off", "none"):
        return {axis: None}
    return {axis: {"policy": value} if axis == "routing" and isinstance(value, str) else value}


def _title(value: Any) -> str:
    """A short name for a value of a list."""
    if isinstance(value, dict):
        return "-".join(_title(item) for item in value.values())
    if value is None or value is False:
        return "off"
    text = str(value)
    return Path(text).name if "/" in text else text
