"""The lowering table: op of the graph -> function that emits its ONNX form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.targets.onnx.context import Dialect, Lowering
from moec.targets.onnx.lowerings import attention, convolution, elementwise, linear, norm, recurrences, reduce, shape
from moec.targets.onnx.lowerings.experts import TABLE as EXPERTS

TABLE: Mapping[Any, Lowering] = {
    **elementwise.TABLE,
    **shape.TABLE,
    **reduce.TABLE,
    **linear.TABLE,
    **convolution.TABLE,
    **norm.TABLE,
    **attention.TABLE,
    **recurrences.TABLE,
    **EXPERTS,
}


def onnx_dialect(*, contrib: bool, shared_buffer: bool = False, grouped: bool = False) -> Dialect:
    """The dialect of the ONNX target: with ops of the `com.microsoft` domain or without, see `Dialect`."""
    return Dialect("onnx", TABLE, contrib=contrib, shared_buffer=shared_buffer, grouped=grouped)
