"""Sequences that run together give the bits that each gives alone, and read every weight once."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from moec import passes
from moec.compiler.ir import lockstep
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.lockstep import Lockstep, Step, steps_of
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import LazyTensor

MASK = np.array([[0] * 4 + [1] * 8, [1] * 12])


def sequences(program: Program) -> list[tuple[np.ndarray, np.ndarray | None, tuple[int, ...]]]:
    random = np.random.default_rng(0)
    ids = [random.integers(0, program.vocab_size, shape) for shape in ((2, 12), (1, 30), (2, 12))]
    return [(ids[0], None, (5, 4, 3)), (ids[1], None, (30,)), (ids[2], MASK, (9, 1, 2))]


def alone(program: Program, ids: np.ndarray, mask: np.ndarray | None, steps: tuple[int, ...]) -> np.ndarray:
    runner, pieces, offset = ProgramRunner(program), list[np.ndarray](), 0
    for step in steps:
        stop = offset + step
        pieces.append(runner.decode(ids[:, offset:stop], None if mask is None else mask[:, :stop]))
        offset = stop
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize(
    ("family", "final"),
    [("mixtral", False), ("gpt_oss", True), ("qwen3_next", True), ("deepseek_v3", False), ("llama4_text", False)],
)
def test_together_as_alone(capture_of: Callable[[str], Program], family: str, final: bool) -> None:
    program = capture_of(family)
    if final:
        program, _ = passes.run_passes(program, passes.default_passes())
    given = sequences(program)
    got = Lockstep(program).run_together([steps_of(*own) for own in given])
    for logits, own in zip(got, given, strict=True):
        np.testing.assert_array_equal(logits, alone(program, *own))


class Counted(LazyTensor):
    """A tensor that counts how often each row is read."""

    def __init__(self, inner: LazyTensor, reads: Counter[tuple[int, int]]) -> None:
        self.shape, self.dtype, self._inner, self._reads = inner.shape, inner.dtype, inner, reads

    def rows(self, start: int, stop: int) -> torch.Tensor:
        self._reads[start, stop] += 1
        return self._inner.rows(start, stop)


def test_a_model_that_is_not_kept_is_read_once(
    capture_of: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture_of("mixtral")
    reads = {name: Counter[tuple[int, int]]() for name in program.weights}
    counted = {name: Counted(tensor, reads[name]) for name, tensor in program.weights.items()}
    program = program.replace(weights=program.weights.with_tensors(counted))
    stacks = {layer.gate_up_proj for layer in program.layers}
    given = [steps_of(*own) for own in sequences(program)]
    monkeypatch.setattr(lockstep, "CACHED", 0)
    runner = Lockstep(program)
    runner.run_together(given)
    assert {count for name in stacks for count in reads[name].values()} == {1}
    assert all(len(reads[name]) > 1 for name in stacks), "no expert was read by itself"
    assert set(reads["lm_head.weight"].values()) == {1}
    runner.run_together(given)
    assert {count for name in stacks for count in reads[name].values()} == {2}, "weights were kept"


def test_every_step_has_its_own_observer_and_values_are_dropped(capture_of: Callable[[str], Program]) -> None:
    program = capture_of("mixtral")
    seen: list[tuple[int, fx.Node]] = []

    def observer(number: int) -> Callable[[fx.Node, tuple[Any, ...], Any], None]:
        def note(node: fx.Node, args: tuple[Any, ...], result: Any) -> None:
            if node.target is EXPERTS:
                assert len(args[0]) == len(result) == (3, 5)[number]
                seen.append((number, node))

        return note

    ids = sequences(program)[1][0]
    Lockstep(program).run_together([[Step(ids[:, :3], None, observer(0)), Step(ids[:, 3:8], None, observer(1))]])
    # Layer by layer, not step by step.
    assert seen == [(number, node) for node in program.nodes(EXPERTS) for number in (0, 1)]
