"""Looking up the lowering of an op in the table of a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from moec.compiler.common.errors import LoweringError
from moec.compiler.common.validation import nearest
from moec.compiler.ir.program import module_of


def lookup(table: Mapping[Any, Callable[..., Any]], node: fx.Node, target: str) -> Callable[..., Any]:
    """The lowering function of `node`.

    Args:
        table: Op -> function.
        node: A call.
        target: Name of the target, for the message.

    Raises:
        LoweringError: There is none; the message names the op, the module and the nearest op that has one.
    """
    found = table.get(node.target)
    if found is not None:
        return found
    near = nearest(str(node.target), map(str, table))
    raise LoweringError(
        f"{module_of(node)}: the target {target} has no lowering for {node.target}",
        hint=f"the nearest op that has one is {near}" if near else "passes/decompose is the place for a rule",
    )
