"""The lowering table: op of the graph -> function that emits its LiteRT form."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import fx

from moec.compiler.common.errors import LoweringError
from moec.compiler.ir.program import module_of
from moec.targets.tflite.lowerings import attention, convolution, elementwise, experts, linear, norm, reduce, shape
from moec.targets.tflite.lowerings.elementwise import Lowering

TABLE: Mapping[Any, Lowering] = {
    **elementwise.TABLE,
    **shape.TABLE,
    **reduce.TABLE,
    **linear.TABLE,
    **convolution.TABLE,
    **norm.TABLE,
    **attention.TABLE,
    **experts.TABLE,
}


def lookup(node: fx.Node) -> Lowering:
    """The lowering function of `node`.

    Raises:
        LoweringError: There is none; the message names the op, the module and the nearest op that has one.
    """
    found = TABLE.get(node.target)
    if found is not None:
        return found
    near = difflib.get_close_matches(str(node.target), [str(target) for target in TABLE], n=1)
    raise LoweringError(
        f"{module_of(node)}: the TFLite target has no lowering for {node.target}",
        hint=f"the nearest op that has one is {near[0]}" if near else "targets/tflite/lowerings is the place to add it",
    )
