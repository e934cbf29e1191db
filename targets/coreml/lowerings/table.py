"""The lowering table: op of the graph -> function that emits its MIL form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.targets.coreml.lowerings import (
    attention,
    convolution,
    elementwise,
    experts,
    indexing,
    linear,
    norm,
    recurrences,
    reduce,
    shape,
)
from moec.targets.coreml.lowerings.elementwise import Lowering

TABLE: Mapping[Any, Lowering] = {
    **elementwise.TABLE,
    **shape.TABLE,
    **indexing.TABLE,
    **reduce.TABLE,
    **linear.TABLE,
    **convolution.TABLE,
    **norm.TABLE,
    **attention.TABLE,
    **recurrences.TABLE,
    **experts.TABLE,
}
