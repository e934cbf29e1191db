"""The lowering table: op of the graph -> function that emits its LiteRT operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.targets.common import lowerings
from moec.targets.common.table import joined
from moec.targets.tflite.lowerings import (
    attention,
    convolution,
    elementwise,
    experts,
    indexer,
    linear,
    norm,
    recurrences,
    reduce,
    shape,
)
from moec.targets.tflite.lowerings.elementwise import Lowering

_MODULES = (attention, convolution, elementwise, experts, indexer, linear, norm, recurrences, reduce, shape)

TABLE: Mapping[Any, Lowering] = joined(lowerings.TABLE, *(module.TABLE for module in _MODULES))
