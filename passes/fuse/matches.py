"""What passes share that look for a pattern at each node and make one op of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program, module_of
from moec.passes.base import PassResult
from moec.passes.rewriting import Rewrite


def fuse_each(name: str, program: Program, fuse: Callable[[fx.Graph, fx.Node], bool | str]) -> PassResult:
    """Fuse what ends in a node of `program`, for each of its nodes.

    Args:
        name: Of the pass.
        program: Where to.
        fuse: Rewrites what ends in a node and returns True; False where there is nothing, or why it is left as it is
            although it nearly is what the pass looks for.
    """
    rewrite, modified = Rewrite(program), False
    for node in list(rewrite.graph.nodes):
        found = fuse(rewrite.graph, node)
        if isinstance(found, str):
            rewrite.rejections.append(Rejection(name, module_of(node), found))
        modified |= found is True
    return rewrite.result(modified=modified)
