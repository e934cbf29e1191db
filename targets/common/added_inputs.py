"""Inputs that passes added. In formats whose inputs have no defaults, the runner must feed them. Imports no torch.

A routing budget is one value for all tokens and has a default. An input with one row per token, such as
`inputs_embeds` (`moec.passes.inputs_embeds`), defaults to zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.common.errors import UsageError

if TYPE_CHECKING:
    from moec.compiler.ir.program import Program

SEQUENCE = "sequence"


def default_values(program: Program) -> dict[str, list[float]]:
    """Name -> default values, flattened, of each added input that is the same for all tokens."""
    defaults = program.input_defaults
    return {
        spec.name: defaults[spec.name].reshape(-1).tolist()
        for spec in program.inputs
        if spec.name in defaults and SEQUENCE not in spec.shape
    }


def row_widths(program: Program) -> dict[str, int]:
    """Name -> width of each added input [batch, sequence, width]: those with one row per token."""
    added = program.input_defaults
    specs = (spec for spec in program.inputs if spec.name in added and SEQUENCE in spec.shape)
    return {spec.name: int(spec.shape[-1]) for spec in specs}


def rows(widths: Mapping[str, int], given: Mapping[str, np.ndarray], batch: int, tokens: int) -> dict[str, np.ndarray]:
    """The arrays to feed for one call: those that the user gave, and zeros for the others.

    Args:
        widths: See `row_widths`.
        given: The user's arrays [batch, tokens, width] by name.
        batch: Number of sequences.
        tokens: Number of tokens per sequence.

    Returns:
        An array [batch, tokens, width] for each of `widths`.

    Raises:
        UsageError: A given array has another shape.
    """
    made = {}
    for name, width in widths.items():
        array, shape = given.get(name), (batch, tokens, width)
        if array is not None and array.shape != shape:
            raise UsageError(
                f"{name} has the shape {list(array.shape)}, but this call needs {list(shape)}",
                hint="give one row for each token of the call, or remove the entry from `overrides`",
            )
        made[name] = np.zeros(shape, np.float32) if array is None else array
    return made
