"""The lowering table: op of the graph -> function that emits its ONNX form."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import fx

from moec.compiler.common.errors import LoweringError
from moec.compiler.ir.program import module_of
from moec.targets.onnx.context import Dialect, Lowering
from moec.targets.onnx.lowerings import attention, convolution, elementwise, linear, norm, reduce, shape
from moec.targets.onnx.lowerings.experts import TABLE as EXPERTS

TABLE: Mapping[Any, Lowering] = {
    **elementwise.TABLE,
    **shape.TABLE,
    **reduce.TABLE,
    **linear.TABLE,
    **convolution.TABLE,
    **norm.TABLE,
    **attention.TABLE,
    **EXPERTS,
}


def onnx_dialect(*, contrib: bool, shared_buffer: bool = False, grouped: bool = False) -> Dialect:
    """The dialect of the ONNX target: with ops of the `com.microsoft` domain or without, see `Dialect`."""
    return Dialect("onnx", TABLE, contrib=contrib, shared_buffer=shared_buffer, grouped=grouped)


def lookup(node: fx.Node, dialect: Dialect) -> Lowering:
    """The lowering function of `node`.

    Raises:
        LoweringError: There is none; the message names the op, the module and the nearest op that has one.
    """
    found = dialect.table.get(node.target)
    if found is not None:
        return found
    names = [str(target) for target in dialect.table]
    near = difflib.get_close_matches(str(node.target), names, n=1)
    raise LoweringError(
        f"{module_of(node)}: the {dialect.target.upper()} target has no lowering for {node.target}",
        hint=f"the nearest op that has one is {near[0]}" if near else "targets/onnx/lowerings is the place to add it",
    )
