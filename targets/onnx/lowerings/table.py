"""The lowering table: op of the graph -> function that emits its ONNX form."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import fx

from moec.compiler.errors import LoweringError
from moec.compiler.program import module_of
from moec.targets.onnx.lowerings import attention, elementwise, linear, norm, reduce, shape
from moec.targets.onnx.lowerings.elementwise import Lowering
from moec.targets.onnx.lowerings.experts import TABLE as EXPERTS

TABLE: Mapping[Any, Lowering] = {
    **elementwise.TABLE,
    **shape.TABLE,
    **reduce.TABLE,
    **linear.TABLE,
    **norm.TABLE,
    **attention.TABLE,
    **EXPERTS,
}


def lookup(node: fx.Node) -> Lowering:
    """The lowering function of `node`.

    Raises:
        LoweringError: There is none; the message names the op, the module and the nearest op that has one.
    """
    found = TABLE.get(node.target)
    if found is not None:
        return found
    names = [str(target) for target in TABLE]
    near = difflib.get_close_matches(str(node.target), names, n=1)
    raise LoweringError(
        f"{module_of(node)}: the ONNX target has no lowering for {node.target}",
        hint=f"the nearest op that has one is {near[0]}" if near else "targets/onnx/lowerings is the place to add it",
    )
