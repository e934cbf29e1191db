"""Inputs that passes added, for formats whose inputs have no defaults: a runner feeds them. Imports no torch.

A routing budget is one value for all tokens, with a default. An input with a row for each token, such as
`inputs_embeds` (`moec.passes.inputs_embeds`), is zeros where nobody feeds it.
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
    """Name -> elements of each input that is the same for all tokens."""
    defaults = program.input_defaults
    return {
        spec.name: defaults[spec.name].reshape(-1).tolist()
        for spec in program.inputs
        if spec.name in defaults and SEQUENCE not in spec.shape
    }


def row_widths(program: Program) -> dict[str, int]:
    """Name -> width of each input [batch, sequence, width] with a row for each token."""
    added = program.input_defaults
    specs = (spec for spec in program.inputs if spec.name in added and SEQUENCE in spec.shape)
    return {spec.name: int(spec.shape[-1]) for spec in specs}


def rows(widths: Mapping[str, int], given: Mapping[str, np.ndarray], batch: int, tokens: int) -> dict[str, np.ndarray]:
    """What is fed for the tokens of a call.

    Args:
        widths: See `row_widths`.
        given: Arrays [batch, tokens, width] by name, of those that are not zeros.
        batch: Sequences.
        tokens: Tokens of each.

    Returns:
        An array [batch, tokens, width] for each of `widths`.

    Raises:
        UsageError: What is given has another shape.
    """
    made = {}
    for name, width in widths.items():
        array, shape = given.get(name), (batch, tokens, width)
        if array is not None and array.shape != shape:
            raise UsageError(
                f"{name} has the shape {list(array.shape)}, and the tokens of this call need {list(shape)}",
                hint="give a row for each token of the call, or take it out of `overrides`",
            )
        made[name] = np.zeros(shape, np.float32) if array is None else array
    return made
