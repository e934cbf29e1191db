"""Experts that are stored [in, out] become [E, out, in], read one expert at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.compiler.ir.interpreter import Interpreter
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, Program
from moec.passes.experts.canonical_experts import CanonicalExperts

HIDDEN, INNER, COUNT = 8, 6, 4


def layer(build: Any, *, transposed: bool) -> Program:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (COUNT, 2 * INNER, HIDDEN), "down": (COUNT, HIDDEN, INNER)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if transposed:
        values = {name: value.transpose(1, 2).contiguous() for name, value in values.items()}
    hidden, weights = build.input("hidden", 3, HIDDEN), build.input("weights", 3, 2)
    indices = build.weight("indices", torch.tensor([[0, 2], [1, 0], [3, 2]]))
    stacks = (build.weight("up", values["up"]), None, build.weight("down", values["down"]), None)
    gate = ("silu", True, True, transposed, 1.702, 0.7, 1.0)
    return build.program(build.call(EXPERTS, hidden, indices, weights, *stacks, *gate))


def test_stacks_are_turned_and_mean_the_same(build: Any) -> None:
    before = layer(build, transposed=True)
    found = CanonicalExperts().run(before)
    (node,) = found.program.nodes(EXPERTS)
    own = Experts.of(node)
    assert found.modified
    assert not own.transposed
    assert (own.gate, own.intermediate_size) == (Experts.of(before.nodes(EXPERTS)[0]).gate, INNER)
    assert own.gate_up_proj.meta["val"].shape == (COUNT, 2 * INNER, HIDDEN)
    want, got = (Interpreter(program).run(build.feeds)["logits"] for program in (before, found.program))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", [0, 3])
def test_one_expert_is_read_alone(build: Any, row: int) -> None:
    before = layer(build, transposed=True)
    after = CanonicalExperts().run(before).program
    assert torch.equal(after.weights["up.linear"].rows(row, row + 1)[0], before.weights["up"].rows(row, row + 1)[0].T)


def test_what_is_stored_so_already_stays(build: Any) -> None:
    assert not CanonicalExperts().run(layer(build, transposed=False)).modified
