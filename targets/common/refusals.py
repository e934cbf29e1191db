"""Finding out what a target cannot build before anything is written.

Each reason to refuse is stated once, in the lowering, which raises `RefusedError`. The lint runs that same lowering
without reading weights, so the two cannot differ. Unsupported ops and weight formats are found without lowering: they
are listed first, so that one message names all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx

from moec.compiler.common.errors import LoweringError, UnsupportedModelError
from moec.compiler.common.rejections import Rejection
from moec.compiler.common.validation import nearest
from moec.compiler.ir.program import Program, module_of
from moec.quantize.lazy import Coded

LISTED = 3
"""Maximum number of modules or tensors that one rejection names."""


class RefusedError(LoweringError):
    """A target does not support something in a Program.

    Args:
        where: Modules, tensors or an option.
        reason: What is not supported, and why.
        hint: What the user can do about it.
    """

    def __init__(self, where: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{where}: {reason}", hint=hint)
        self.where, self.reason = where, reason


def refuse(node: fx.Node, reason: str, hint: str = "") -> RefusedError:
    """The error for a node that the target does not support."""
    return RefusedError(module_of(node), f"{node.target}: {reason}", hint=hint)


def refused_by(target: str, lowering: Callable[[], object]) -> tuple[Rejection, ...]:
    """The first thing that `lowering` refuses, as a rejection; empty if it succeeds.

    Args:
        target: Name of the target.
        lowering: The whole lowering except for reading weights.
    """
    try:
        lowering()
    except RefusedError as error:
        return (Rejection(target, error.where, error.reason, error.hint),)
    except (LoweringError, UnsupportedModelError) as error:
        return (Rejection(target, "the model", error.message, error.hint),)
    return ()


def hint_for(table: Mapping[Any, Any], op: object) -> str:
    """A hint for an op that is not in `table`."""
    near = nearest(str(op), map(str, table))
    return f"the nearest supported op is {near}" if near else "add a rule for the op to passes/decompose"


def unsupported_ops(target: str, table: Mapping[Any, Any], nodes: Iterable[fx.Node]) -> tuple[Rejection, ...]:
    """One rejection for each op that is called and not in `table`, with the modules that call it."""
    users: dict[Any, list[str]] = {}
    for node in nodes:
        if node.op == "call_function" and node.target not in table:
            users.setdefault(node.target, []).append(module_of(node))
    return tuple(
        Rejection(target, first_few(modules), f"no lowering for {op}", hint_for(table, op))
        for op, modules in users.items()
    )


def unsupported_formats(target: str, program: Program, why: Callable[[Coded], str], hint: str) -> tuple[Rejection, ...]:
    """One rejection for each unsupported format and reason, with the weights that have the format.

    Args:
        target: Name of the target.
        program: The Program whose weights are checked.
        why: Why a weight cannot be stored, whatever uses it; empty where it can. The lowering calls it too.
        hint: Which formats are supported.
    """
    users: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(map(program.weights.resolve, program.weight_names())):
        tensor = program.weights[name]
        if isinstance(tensor, Coded) and (reason := why(tensor)):
            users.setdefault((str(tensor.format), reason), []).append(name)
    return tuple(
        Rejection(target, first_few(names), f"format {form}: {reason}", hint) for (form, reason), names in users.items()
    )


def first_few(names: Iterable[str]) -> str:
    """The first `LISTED` distinct names, and how many more there are."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - LISTED} more" if len(distinct) > LISTED else ""
    return f"{', '.join(distinct[:LISTED])}{more}"
