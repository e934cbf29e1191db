"""What a target cannot build, known before anything is written.

A reason to refuse is stated once, where the form is made: the lowering raises `RefusedError`. A lint runs that very
lowering on weights that it does not read, so that the two never differ. What can be said of all ops and of all weights
without lowering is listed as a whole first, for one message to name it all.
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
"""Most modules or tensors that one rejection names."""


class RefusedError(LoweringError):
    """A target has no form for something of a Program.

    Args:
        where: Modules or tensors, or an option.
        reason: Why there is none.
        hint: What the user can do about it.
    """

    def __init__(self, where: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{where}: {reason}", hint=hint)
        self.where, self.reason = where, reason


def refuse(node: fx.Node, reason: str, hint: str = "") -> RefusedError:
    """The error for a call that has no form."""
    return RefusedError(module_of(node), f"{node.target}: {reason}", hint=hint)


def refused_by(target: str, lowering: Callable[[], object]) -> tuple[Rejection, ...]:
    """What `lowering` refuses first, or nothing.

    Args:
        target: Name of the target.
        lowering: All of its lowering but the reading of weights.
    """
    try:
        lowering()
    except RefusedError as error:
        return (Rejection(target, error.where, error.reason, error.hint),)
    except (LoweringError, UnsupportedModelError) as error:
        return (Rejection(target, "the model", error.message, error.hint),)
    return ()


def hint_for(table: Mapping[Any, Any], op: object) -> str:
    """A hint for an op that `table` does not have."""
    near = nearest(str(op), map(str, table))
    return f"the nearest op that has one is {near}" if near else "passes/decompose is the place for a rule"


def ops_without_form(target: str, table: Mapping[Any, Any], nodes: Iterable[fx.Node]) -> tuple[Rejection, ...]:
    """One rejection for each op that is called and not in `table`, with the modules that call it."""
    users: dict[Any, list[str]] = {}
    for node in nodes:
        if node.op == "call_function" and node.target not in table:
            users.setdefault(node.target, []).append(module_of(node))
    return tuple(
        Rejection(target, listed(modules), f"no lowering for {op}", hint_for(table, op))
        for op, modules in users.items()
    )


def formats_without_form(
    target: str, program: Program, why: Callable[[Coded], str], hint: str
) -> tuple[Rejection, ...]:
    """One rejection for each format and reason, with the weights that have it.

    Args:
        target: Name of the target.
        program: Its weights are looked at.
        why: Why a weight has no form whatever it is used for; empty where it has one. The lowering asks it too.
        hint: Which formats have one.
    """
    users: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(map(program.weights.resolve, program.weight_names())):
        tensor = program.weights[name]
        if isinstance(tensor, Coded) and (reason := why(tensor)):
            users.setdefault((str(tensor.format), reason), []).append(name)
    return tuple(
        Rejection(target, listed(names), f"format {form}: {reason}", hint) for (form, reason), names in users.items()
    )


def listed(names: Iterable[str]) -> str:
    """The first few of `names`, and how many more there are; each once."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - LISTED} more" if len(distinct) > LISTED else ""
    return f"{', '.join(distinct[:LISTED])}{more}"
