"""What passes share that look for a pattern at each node and make one op of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program, module_of
from moec.passes.base import PassResult
from moec.passes.rewriting import rewritten


def fuse_each(name: str, program: Program, fuse: Callable[[fx.Graph, fx.Node], bool | str]) -> PassResult:
    """Fuse what ends in a node of `program`, for each of its nodes.

    Args:
        name: Of the pass.
        program: Where to.
        fuse: Rewrites what ends in a node and returns True; False where there is nothing, or why it is left as it is
            although it nearly is what the pass looks for.
    """
    graph, modified = program.copy_graph(), False
    rejections: list[Rejection] = []
    for node in list(graph.nodes):
        found = fuse(graph, node)
        if isinstance(found, str):
            rejections.append(Rejection(name, module_of(node), found))
        modified |= found is True
    return PassResult(rewritten(program, graph) if modified else program, modified, tuple(rejections))
