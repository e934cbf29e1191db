"""The loop of passes that look for a pattern at each node."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program, module_of
from moec.passes.base import PassResult
from moec.passes.rewriting import Rewrite


def fuse_each(name: str, program: Program, fuse: Callable[[fx.Graph, fx.Node], bool | str]) -> PassResult:
    """Try to fuse a pattern that ends in each node of `program`.

    Args:
        name: Name of the pass.
        program: The program to rewrite.
        fuse: Rewrites the pattern that ends in a node. Returns True if it did, False if there is no pattern, or the
            reason why a near-match is left unchanged.
    """
    rewrite, modified = Rewrite(program), False
    for node in list(rewrite.graph.nodes):
        found = fuse(rewrite.graph, node)
        if isinstance(found, str):
            rewrite.rejections.append(Rejection(name, module_of(node), found))
        modified |= found is True
    return rewrite.result(modified=modified)
