"""Dead code elimination for nodes and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.compiler.ir.program import Program
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import rewritten


@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove nodes without users, and weights that no node uses. Inputs and states stay: they are the signature.

    ```
    %a = cos(%x); %b = sin(%x); return %a
    ->
    %a = cos(%x); return %a
    ```
    """

    name: ClassVar[str] = "dead-code"

    def run(self, program: Program) -> PassResult:
        """See the class."""
        graph = program.copy_graph()
        before = len(graph.nodes)
        for node in reversed(graph.nodes):
            if node.op in ("call_function", "get_attr") and not node.users:
                graph.erase_node(node)
        changed = rewritten(program, graph)
        weights = program.weights.only(changed.weight_names())
        modified = len(graph.nodes) < before or len(weights) < len(program.weights)
        return PassResult(changed.replace(weights=weights) if modified else program, modified)
