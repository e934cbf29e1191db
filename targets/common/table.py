"""Looking up the lowering of an op in the table of a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.program import module_of
from moec.targets.common.refusals import RefusedError, hint_for


def joined(*tables: Mapping[Any, Any]) -> dict[Any, Any]:
    """Several tables in one; no op may be in two of them."""
    found = dict[Any, Any]()
    for table in tables:
        assert not found.keys() & table.keys(), found.keys() & table.keys()
        found |= table
    return found


def named(names: str, spelled: Callable[[str], str] = str) -> dict[Any, str]:
    """Aten ops -> their names in a runtime, for ops whose name there is `spelled` of torch's name."""
    return {getattr(torch.ops.aten, name).default: spelled(name) for name in names.split()}


def lookup(table: Mapping[Any, Callable[..., Any]], node: fx.Node, target: str) -> Callable[..., Any]:
    """The lowering function of `node`.

    Args:
        table: Op -> function.
        node: A call.
        target: Name of the target, for the message.

    Raises:
        RefusedError: The table lacks the op; the message names the op, the module and the nearest supported op.
    """
    found = table.get(node.target)
    if found is not None:
        return found
    reason = f"the {target} target has no lowering for {node.target}"
    raise RefusedError(module_of(node), reason, hint=hint_for(table, node.target))
