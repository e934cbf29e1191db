"""The lowering table: op of the graph -> function that emits its ONNX nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.targets.common import lowerings
from moec.targets.common.table import joined
from moec.targets.onnx.context import Dialect, Lowering
from moec.targets.onnx.lowerings import (
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

_MODULES = (attention, convolution, elementwise, experts, indexer, linear, norm, recurrences, reduce, shape)

TABLE: Mapping[Any, Lowering] = joined(lowerings.TABLE, lowerings.SIZES, *(module.TABLE for module in _MODULES))


def onnx_dialect(
    *,
    contrib: bool,
    shared_buffer: bool = False,
    grouped: bool = False,
    recent_qmoe: bool = True,
    decode: bool = False,
) -> Dialect:
    """The dialect of the ONNX target: with ops of the `com.microsoft` domain or without, see `Dialect`."""
    return Dialect(
        "onnx",
        TABLE,
        contrib=contrib,
        shared_buffer=shared_buffer,
        grouped=grouped,
        recent_qmoe=recent_qmoe,
        decode=decode,
    )
