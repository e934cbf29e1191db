"""Common subexpression elimination."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moec.compiler.ir.program import EXPERTS, Program
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import Rewrite, replace, size_of


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merge equal calls into one node. Sizes are equal if their symbolic expressions are.

    ```
    %a = unsqueeze(%cos, 1); %b = mul(%q, %a); %c = unsqueeze(%cos, 1); %d = mul(%k, %c)
    ->
    %a = unsqueeze(%cos, 1); %b = mul(%q, %a); %d = mul(%k, %a)
    ```
    """

    name: ClassVar[str] = "common-subexpressions"

    def run(self, program: Program) -> PassResult:
        """See the class."""
        rewrite, modified = Rewrite(program), False
        seen: dict[Hashable, fx.Node] = {}
        for node in list(rewrite.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                replace(node, first)
                modified = True
        return rewrite.result(modified=modified)


def _key(node: fx.Node) -> Hashable | None:
    """A key that is equal for nodes of the same value; None for nodes that must not be merged."""
    if node.op == "get_attr":
        return ("get_attr", node.target)
    # Experts nodes are rows of the MoE layer table, so two of them are never merged.
    if node.op != "call_function" or node.target is EXPERTS:
        return None
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return ("size", size_of(value))
    if isinstance(node.target, torch._ops.OpOverload):
        tags, schema = node.target.tags, node.target._schema
        if torch.Tag.nondeterministic_seeded in tags or schema.is_mutable or not schema.returns:
            return None
    return (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))


def _frozen(argument: Any) -> Hashable:
    """An argument as a hashable key, in which 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(argument, list | tuple):
        return tuple(_frozen(item) for item in argument)
    if isinstance(argument, bool | int | float):
        return (type(argument).__name__, repr(argument))
    hashable: Hashable = argument
    return hashable
