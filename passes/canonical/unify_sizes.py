"""Use one symbol for each dynamic axis of the signature, so that equal sizes compare as equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.compiler.ir.program import Program
from moec.compiler.ir.specialise import reinfer_values
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import rewritten, size_of


@dataclass(frozen=True)
class UnifySizes(Pass):
    """Replace the symbols of each input, which the trace makes separately, by shared ones: one batch, one sequence.

    ```
    %input_ids: i64[s1, s2] = input; %past_0_key: f32[s3, 4, s4, 64] = input
    ->
    %input_ids: i64[batch, sequence] = input; %past_0_key: f32[batch, 4, past_sequence, 64] = input
    ```
    """

    name: ClassVar[str] = "unify-sizes"

    def run(self, program: Program) -> PassResult:
        """See the class."""
        if not _differs(program):
            return PassResult(program, modified=False)
        return PassResult(rewritten(program, reinfer_values(program, {})), modified=True)


def _differs(program: Program) -> bool:
    """Whether a placeholder has another symbol than that of its axis."""
    specs = [*program.inputs, *(state.input for state in program.states)]
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), specs, strict=True):
        for size, axis in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(axis, str) and size_of(size) != size_of(program.dims[axis]):
                return True
    return False
