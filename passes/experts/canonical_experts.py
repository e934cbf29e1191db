"""One layout for all experts: [E, out, in], as in `linear`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import LazyTensor, swap_last
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import Rewrite


@dataclass(frozen=True)
class CanonicalExperts(Pass):
    """Swap the axes of experts that are stored [in, out] (gpt-oss, Llama 4), lazily, one expert at a time.

    ```
    experts(.., @gate_up_proj[E, H, 2I], .., @down_proj[E, I, H], .., transposed=True)
    ->
    experts(.., @gate_up_proj.linear[E, 2I, H], .., @down_proj.linear[E, H, I], .., transposed=False)
    ```
    """

    name: ClassVar[str] = "canonical-experts"
    requires: ClassVar[tuple[str, ...]] = ("fold-weights",)

    def run(self, program: Program) -> PassResult:
        """See the class."""
        rewrite = Rewrite(program)
        for node in rewrite.graph.find_nodes(op="call_function", target=EXPERTS):
            own = Experts.of(node)
            if own.transposed:
                stacks = (own.gate_up_proj, own.down_proj)
                up, down = (_swapped(program, node, stack, rewrite.added) for stack in stacks)
                node.args = replace(own, gate_up_proj=up, down_proj=down, transposed=False).args
        return rewrite.result(modified=bool(rewrite.added))


def _swapped(program: Program, node: fx.Node, old: fx.Node, added: dict[str, LazyTensor]) -> fx.Node:
    name = f"{program.weights.resolve(str(old.target))}.linear"
    added[name] = swap_last(program.weights[str(old.target)])
    with node.graph.inserting_before(node):
        new = node.graph.create_node("get_attr", name)
    new.meta = {"val": old.meta["val"].transpose(1, 2), "module": old.meta.get("module", "")}
    return new
