"""Looking up the lowering of an op in the table of a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from moec.compiler.ir.program import module_of
from moec.targets.common.refusals import RefusedError, hint_for


def lookup(table: Mapping[Any, Callable[..., Any]], node: fx.Node, target: str) -> Callable[..., Any]:
    """The lowering function of `node`.

    Args:
        table: Op -> function.
        node: A call.
        target: Name of the target, for the message.

    Raises:
        RefusedError: There is none; the message names the op, the module and the nearest op that has one.
    """
    found = table.get(node.target)
    if found is not None:
        return found
    reason = f"the target {target} has no lowering for {node.target}"
    raise RefusedError(module_of(node), reason, hint=hint_for(table, node.target))
