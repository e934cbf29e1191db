"""The lowering table: op of the graph -> function that emits its MIL ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.targets.common import lowerings
from moec.targets.common.table import joined
from moec.targets.coreml.lowerings import (
    attention,
    convolution,
    elementwise,
    experts,
    indexer,
    indexing,
    linear,
    norm,
    recurrences,
    reduce,
    shape,
)
from moec.targets.coreml.lowerings.elementwise import Lowering

_MODULES = (attention, convolution, elementwise, experts, indexer, indexing, linear, norm, recurrences, reduce, shape)

TABLE: Mapping[Any, Lowering] = joined(lowerings.TABLE, lowerings.SIZES, *(module.TABLE for module in _MODULES))
