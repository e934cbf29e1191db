"""The gates together: order, exit codes, and that nothing but a pass is a pass."""

# ruff: noqa: ARG002, ARG005 - the arguments are those of the protocols

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.integrity import expert_weights, other_weights
from moec.compiler.gates.reference import reference_threads
from moec.compiler.gates.repeatability import RepeatabilityOptions
from moec.compiler.gates.run import SEVERAL_FAILED, ExpertTensors, GateInputs, exit_code, run_gate, run_gates, table
from moec.compiler.ir import lockstep
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import Converted, LazyTensor
from moec.targets import base, runners
from moec.targets.stored_weights import StoredWeight

from .conftest import OPTIONS, program_experts, zero_4kb  # noqa: TID252 - tests are no package with a name of its own

Captured = tuple[Checkpoint, Program]


class InterpreterTarget(base.Target):
    """Its artifact is a Program."""

    name = "interpreter"

    def __init__(self, program: Program) -> None:
        self.program = program

    def capabilities(self, options: base.TargetOptions, phase: base.Phase) -> base.Capabilities:
        return base.Capabilities(skips_experts=True)

    def lower(self, program: Program, options: base.TargetOptions, directory: Path, progress: Progress) -> base.Lowered:
        return base.Lowered((), {})

    def open(self, directory: Path, *, threads: int = 0) -> runners.Runner:
        return ProgramRunner(self.program)

    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, base.ExpertsRunner]:
        return {"the Program": program_experts(self.program)}

    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        def stored(name: str) -> StoredWeight:
            return StoredWeight(None, lambda start, stop: self.program.weights[name].rows(start, stop).numpy())

        return {name: stored(name) for name in (*expert_weights(self.program), *other_weights(self.program))}


class BrokenTarget(InterpreterTarget):
    def open(self, directory: Path, *, threads: int = 0) -> runners.Runner:
        raise ArtifactError("model.bin: truncated", hint="build it again")


def _run(captured: Captured, target: base.Target, **more: Any) -> tuple[Verdict, ...]:
    checkpoint, program = captured
    return run_gates(
        GateInputs(checkpoint, program, program, target, Path()),
        OPTIONS,
        repeatability=RepeatabilityOptions(runs=3, tokens=40),
        **more,
    )


def test_a_right_artifact_passes_every_gate(mixtral: Captured) -> None:
    told: list[str] = []
    during: set[str] = set()

    class Watched(InterpreterTarget):
        def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
            def noted(weight: StoredWeight) -> StoredWeight:
                return replace(weight, rows=lambda *rows: during.add(told[-1]) or weight.rows(*rows))

            return {
                name: noted(weight) if name in expert_weights(self.program) else weight
                for name, weight in super().stored_weights(directory).items()
            }

    verdicts = _run(mixtral, Watched(mixtral[1]), progress=lambda what, done, total: told.append(what))
    proofs = ["parity: capture", "parity: artifact", "coverage", "integrity", "repeatability"]
    assert [verdict.gate for verdict in verdicts] == proofs
    assert {verdict.status for verdict in verdicts} == {Status.PASS}
    assert exit_code(verdicts) == 0
    assert all(verdict.figures["seconds"] >= 0 for verdict in verdicts)
    assert verdicts[1].figures["runner"]["runtime"] == "moec interpreter"
    assert "integrity" in told
    assert during == {"parity: artifact"}  # whose reference makes the values of every expert


def test_all_gates_read_each_expert_of_the_final_program_once(
    mixtral: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, captured = mixtral
    reads = Counter[tuple[str, int, int]]()

    class Counted(Converted):
        def __init__(self, name: str, source: LazyTensor) -> None:
            self.name, self.source, self.dtype = name, source, source.dtype

        def rows(self, start: int, stop: int) -> torch.Tensor:
            reads[self.name, start, stop] += 1
            return self.source.rows(start, stop)

    experts = {name: Counted(name, captured.weights[name]) for name in expert_weights(captured)}
    final = captured.replace(weights=captured.weights.with_tensors(experts))
    monkeypatch.setattr(lockstep, "CACHED", 0)
    verdicts = run_gates(
        GateInputs(checkpoint, captured, final, InterpreterTarget(captured), Path()),
        OPTIONS,
        repeatability=RepeatabilityOptions(runs=3, tokens=40),
    )
    assert {verdict.status for verdict in verdicts} == {Status.PASS}
    assert reads.keys() == {
        (name, index, index + 1) for name in experts for index in range(captured.weights[name].shape[0])
    }
    assert set(reads.values()) == {1}


def test_a_damaged_expert_fails_parity_coverage_and_integrity(mixtral: Captured) -> None:
    verdicts = _run(mixtral, InterpreterTarget(zero_4kb(mixtral[1], 0, 5)))
    right, wrong = Status.PASS, Status.FAIL
    assert [verdict.status for verdict in verdicts] == [right, wrong, wrong, wrong, right]
    assert exit_code(verdicts) == 5


def test_an_artifact_that_cannot_be_opened_fails_and_proves_no_coverage(mixtral: Captured) -> None:
    verdicts = _run(mixtral, BrokenTarget(mixtral[1]))
    statuses = {verdict.gate: verdict.status for verdict in verdicts}
    assert statuses["parity: artifact"] is Status.FAIL
    assert statuses["coverage"] is Status.NOT_RUN
    assert "truncated (build it again)" in verdicts[1].summary
    assert exit_code(verdicts) == 5


def test_tensors_that_cannot_be_read_fail_integrity_and_not_coverage(mixtral: Captured) -> None:
    program = mixtral[1]

    def unreadable(start: int, _stop: int) -> np.ndarray:
        raise KeyError(f"codes of expert {start}")

    class Unreadable(InterpreterTarget):
        def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
            return dict.fromkeys(super().stored_weights(directory), StoredWeight(None, unreadable))

    experts = ExpertTensors(GateInputs(mixtral[0], program, program, Unreadable(program), Path()))
    for name, index in ((program.layers[0].down_proj, 3), (program.layers[0].down_proj, 4)):
        experts.watch(name, index, program.weights[name].rows(index, index + 1)[0])
    with pytest.raises(KeyError, match="codes of expert 3"):
        experts.comparisons()


class ClosedTarget(InterpreterTarget):
    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, base.ExpertsRunner]:
        return base.Target.open_experts(self, directory, threads=threads)


def test_a_target_that_runs_no_expert_by_itself_is_not_covered(mixtral: Captured) -> None:
    verdict = next(item for item in _run(mixtral, ClosedTarget(mixtral[1])) if item.gate == "coverage")
    assert verdict.status is Status.NOT_RUN
    assert verdict.summary == "the target interpreter cannot run single experts"
    assert verdict.figures["steps"]["parity: artifact"]["layers"]


def test_further_gates_come_last_and_keep_their_codes(mixtral: Captured) -> None:
    def slow() -> Verdict:
        return Verdict("latency", Status.FAIL, "p50 20 ms, budget 12 ms", 6)

    verdicts = _run(mixtral, BrokenTarget(mixtral[1]), further=[("latency", 6, slow)])
    assert verdicts[-1].gate == "latency"
    assert exit_code(verdicts) == SEVERAL_FAILED
    assert exit_code(verdicts[-1:]) == 6


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError(), KeyError("x"), ArtifactError("damaged")])
def test_a_gate_that_raises_fails(error: Exception) -> None:
    def gate() -> Verdict:
        raise error

    verdict = run_gate("quality", 7, gate)
    assert verdict.status is Status.FAIL
    assert verdict.gate == "quality"
    assert type(error).__name__ in verdict.summary
    assert exit_code([verdict]) == 7


def test_not_run_fails_only_when_asked_to() -> None:
    skipped = Verdict("latency", Status.NOT_RUN, "no GPU", 6)
    assert exit_code([skipped]) == 0
    assert exit_code([skipped], strict=True) == 6


def test_the_table_names_every_status() -> None:
    verdicts = [Verdict(status.value, status, "[why]", 5) for status in Status]
    out = io.StringIO()
    Console(file=out, width=100, no_color=True).print(table(verdicts))
    for text in ("PASS", "FAIL", "NOT RUN", "[why]"):
        assert text in out.getvalue()


def test_the_reference_of_a_small_model_runs_on_one_thread(
    mixtral: Captured, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: torch.set_num_threads(1))  # as the other tests of this folder want it
    _, program = mixtral
    torch.set_num_threads(2)
    with reference_threads(program):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    monkeypatch.setattr("moec.compiler.gates.reference.SMALL", 0)
    with reference_threads(program):
        assert torch.get_num_threads() == 2
