"""The pass that brings a graph to stage CORE."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moec.compiler.ir.operands import bound
from moec.compiler.ir.program import Program
from moec.passes.base import Pass, PassResult
from moec.passes.decompose import activations, arithmetic, creation, indexing, products, reductions, shapes
from moec.passes.decompose.builder import Builder, Rule
from moec.passes.rewriting import Rewrite, substitute

RULES: Mapping[Any, Rule] = {
    **activations.RULES,
    **arithmetic.RULES,
    **creation.RULES,
    **indexing.RULES,
    **products.RULES,
    **reductions.RULES,
    **shapes.RULES,
}
"""Op -> rule. An op that has no rule and is not a core op is refused when a target lowers it."""


@dataclass(frozen=True)
class Decompose(Pass):
    """Rewrite every op in the ops of `moec.compiler.ir.stages.CORE`, with all arguments explicit.

    ```
    %a = softplus(%x, 0.5, 10); %b = rsub(%x, 3, 2); %c = transpose(%y, 0, -1)
    ->
    %s = mul(%x, 0.5); %a = where(gt(%s, full([], 10)), %x, div(softplus(%s, 1, 20), 0.5))
    %b = sub(3, mul(%x, 2)); %c = permute(%y, [2, 1, 0])
    ```
    """

    name: ClassVar[str] = "decompose"
    requires: ClassVar[tuple[str, ...]] = ("normalize", "real-rotary", "rms-norm", "rotary")

    def run(self, program: Program) -> PassResult:
        """See the class."""
        rewrite = Rewrite(program)
        return rewrite.result(modified=decompose(rewrite.graph.nodes))


def decompose(nodes: Iterable[fx.Node]) -> bool:
    """Decompose calls in place, for passes that add calls after `Decompose` has run.

    Args:
        nodes: The calls to decompose.

    Returns:
        Whether anything was changed.
    """
    modified = False
    for node in list(nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            modified |= _bind(node)
            modified |= _decompose(node)
    return modified


def _bind(node: fx.Node) -> bool:
    """Make all arguments of the call explicit; whether anything changed."""
    args, kwargs = bound(node)
    if args == node.args and kwargs == node.kwargs:
        return False
    node.args, node.kwargs = args, kwargs
    return True


def _decompose(node: fx.Node) -> bool:
    rule = RULES.get(node.target)
    if rule is None:
        return False
    with node.graph.inserting_before(node):
        found = rule(Builder(node), *node.args, **node.kwargs)
    if found is None:
        return False
    if isinstance(found, Sequence):
        _replace_results(node, found)
    elif found.target is node.target and found is node.prev:
        # The same op with other arguments: change the node in place, so that it keeps its name.
        node.args, node.kwargs = found.args, found.kwargs
        node.graph.erase_node(found)
    else:
        substitute(node, found)
    return True


def _replace_results(node: fx.Node, found: Sequence[fx.Node | None]) -> None:
    """Replace each `getitem` of a call with several results by the node found for that result."""
    for user in list(node.users):
        assert user.target is operator.getitem, "a call with several results is read by getitem only"
        own = found[user.args[1]]  # type: ignore[index]
        assert own is not None
        user.replace_all_uses_with(own)
        user.graph.erase_node(user)
    node.graph.erase_node(node)
