"""Runs the gates in order, and makes a table and an exit code of their verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from moec.compiler.common.errors import MoecError, first_line, out_of_memory
from moec.compiler.common.memory import fewer_garbage_collections
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.cases import Prompts, bounds
from moec.compiler.gates.coverage import GATE as COVERAGE_GATE
from moec.compiler.gates.coverage import ExpertCalls, judge_coverage, run_every_expert
from moec.compiler.gates.integrity import GATE as INTEGRITY_GATE
from moec.compiler.gates.integrity import Comparisons
from moec.compiler.gates.parity import (
    ARTIFACT_GATE,
    CAPTURE_GATE,
    EXIT_CODE,
    Evidence,
    ParityOptions,
    check_capture,
    gather_artifact,
    judge_parity,
)
from moec.compiler.gates.reference import reference_threads
from moec.compiler.gates.repeatability import EXIT_CODE as REPEATABILITY_EXIT_CODE
from moec.compiler.gates.repeatability import GATE as REPEATABILITY_GATE
from moec.compiler.gates.repeatability import RepeatabilityOptions, judge_repeatability
from moec.compiler.gates.tolerance import Precision, precision_of, weight_precision
from moec.compiler.ir.program import Program
from moec.targets.base import GateSubject, Target
from moec.targets.runners import Runner, limits_of

SEVERAL_FAILED = 12

REPORTED = (MoecError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError, MemoryError)
"""Exceptions that mean a fault of the artifact, the checkpoint or the machine: a gate that raises one has failed."""

Gate = Callable[[], Verdict]


@dataclass(frozen=True)
class GateInputs:
    """The inputs of the gates.

    Attributes:
        checkpoint: The source checkpoint.
        captured: The Program as captured.
        program: The final Program, from which the artifact was lowered.
        target: The target.
        directory: The artifact.
        facts: `Lowered.facts` of the artifact.
        threads: Threads of the artifact's runtime; 0 is its default.
    """

    checkpoint: Checkpoint
    captured: Program
    program: Program
    target: Target
    directory: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 0

    @cached_property
    def runner(self) -> Runner:
        """The opened artifact, which all gates share."""
        return self.target.open_reference(self.directory, threads=self.threads)


def run_gates(
    inputs: GateInputs,
    options: ParityOptions | None = None,
    progress: Progress = lambda *_: None,
    *,
    repeatability: RepeatabilityOptions | None = None,
    further: Sequence[tuple[str, int, Gate]] = (),
) -> tuple[Verdict, ...]:
    """Run parity, coverage, integrity and repeatability, the gates of the target, then `further` gates.

    Args:
        inputs: The artifact, and what it was built from.
        options: Settings of parity and coverage.
        progress: Called for every step of a gate.
        repeatability: Settings of repeatability.
        further: More gates: name, exit code and the function that runs each.

    Returns:
        One verdict per gate, always in the same order. Each carries its duration as the figure "seconds".
    """
    run = _Run(inputs, options or ParityOptions(), repeatability or RepeatabilityOptions(), progress)
    subject = GateSubject(inputs.program, inputs.directory, inputs.facts, run.parity)
    gates: list[tuple[str, int, Gate]] = [
        (CAPTURE_GATE, EXIT_CODE, run.capture),
        (ARTIFACT_GATE, EXIT_CODE, run.artifact),
        (COVERAGE_GATE, EXIT_CODE, run.coverage),
        (INTEGRITY_GATE, EXIT_CODE, run.integrity),
        (REPEATABILITY_GATE, REPEATABILITY_EXIT_CODE, run.repeated),
        *((own.name, own.exit_code, partial(own.judge, subject)) for own in inputs.target.gates()),
        *further,
    ]
    with reference_threads(inputs.program), fewer_garbage_collections():
        return tuple(run_gate(name, code, gate) for name, code, gate in gates)


class _Run:
    """The gates that every target goes through, and the state that they share."""

    def __init__(
        self, inputs: GateInputs, options: ParityOptions, repeatability: RepeatabilityOptions, progress: Progress
    ) -> None:
        self._inputs, self._options, self._repeatability, self._progress = inputs, options, repeatability, progress
        self._experts = ExpertTensors(inputs)
        self._seen: Evidence | None = None
        self._calls: ExpertCalls | None = None

    def _prompts(self, program: Program) -> Prompts:
        return Prompts.of(self._inputs.checkpoint.directory, program.vocab_size, seed=self._options.seed)

    def capture(self) -> Verdict:
        captured = self._inputs.captured
        prompts = self._prompts(captured)
        return check_capture(self._inputs.checkpoint, captured, prompts, self._options, self._progress)

    def artifact(self) -> Verdict:
        return self.parity(ARTIFACT_GATE, self._inputs.runner)

    def parity(self, name: str, runner: Runner) -> Verdict:
        program, options = self._inputs.program, self._options
        rounding = self._inputs.target.activation_rounding(self._inputs.directory)
        calls, watch = None, None
        if name == ARTIFACT_GATE:
            calls, watch = ExpertCalls(program, options.coverage_min), self._experts.watch
        prompts = self._prompts(program)
        seen = gather_artifact(program, runner, prompts, options, self._progress, rounding, calls, watch)
        if name == ARTIFACT_GATE:
            self._seen, self._calls = seen, calls
        verdict = judge_parity(name, seen, options)
        return replace(verdict, figures={**verdict.figures, "runner": dict(runner.facts())})

    def coverage(self) -> Verdict:
        return run_coverage(self._inputs, self._seen, self._calls, self._options, self._progress)

    def integrity(self) -> Verdict:
        return self._experts.comparisons().judge(self._progress)

    def repeated(self) -> Verdict:
        program = self._inputs.program
        return run_repeatability(
            program, precision_of(program), self._inputs.runner, self._options.seed, self._repeatability, self._progress
        )


class ExpertTensors:
    """The comparison of an artifact's expert tensors with the plan's, made while the reference reads them.

    An error of the comparison is kept for the integrity gate and does not fail the gate that is running.

    Args:
        inputs: The artifact, and what it was built from.
    """

    def __init__(self, inputs: GateInputs) -> None:
        self._inputs = inputs
        self._opened: Comparisons | None = None
        self._broken: Exception | None = None

    def comparisons(self) -> Comparisons:
        """The comparisons so far.

        Raises:
            Exception: An error that occurred when an expert was compared, or when the artifact was opened.
        """
        if self._broken is not None:
            raise self._broken
        if self._opened is None:
            self._opened = Comparisons(self._inputs.program, self._inputs.target.stored_weights(self._inputs.directory))
        return self._opened

    def watch(self, name: str, index: int, values: Tensor) -> None:
        """Compare one expert (a `WeightObserver` of the interpreter)."""
        if self._broken is None:
            try:
                self.comparisons().compare(name, index, values)
            except REPORTED as error:
                self._broken = error


def run_coverage(
    inputs: GateInputs, seen: Evidence | None, calls: ExpertCalls | None, options: ParityOptions, progress: Progress
) -> Verdict:
    """The verdict of the coverage gate, with what the artifact's parity step has `seen` and the `calls` beside it."""
    if seen is None or calls is None:
        return Verdict(COVERAGE_GATE, Status.NOT_RUN, f"'{ARTIFACT_GATE}' did not finish", EXIT_CODE)
    runners = inputs.target.open_experts(inputs.directory, threads=inputs.threads)
    if not runners:
        reason = f"the target {inputs.target.name} cannot run single experts"
        figures = {"steps": {ARTIFACT_GATE: seen.usage.figures()}}
        return Verdict(COVERAGE_GATE, Status.NOT_RUN, reason, EXIT_CODE, figures)
    share, known = options.coverage_min, inputs.target.activation_rounding(inputs.directory) is not None
    found = run_every_expert(inputs.program, runners, calls.hidden, share, progress, outputs=calls.outputs)
    precision = weight_precision(inputs.program)
    return judge_coverage(found, list(runners), precision, share, seen.usage, rounding_known=known)


def run_repeatability(
    program: Program,
    precision: Precision,
    runner: Runner,
    seed: int,
    options: RepeatabilityOptions,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """The verdict of the repeatability gate on a prompt of random tokens of `program`."""
    length = bounds(program, limits_of(runner), options.tokens).max_tokens
    ids = Prompts(program.vocab_size, seed=seed).random(1, length)
    return judge_repeatability(runner, ids, precision, options.of_layers(len(program.layers)), progress)


def run_gate(name: str, code: int, gate: Gate) -> Verdict:
    """Run one gate, and time it. A gate that raises one of `REPORTED` has failed with that reason."""
    started = time.perf_counter()
    try:
        verdict = gate()
    except Exception as error:
        told = out_of_memory(error) or error
        if not isinstance(told, REPORTED):
            raise
        hint = told.hint if isinstance(told, MoecError) else ""
        reason = f"{type(told).__name__}: {first_line(told)}" + (f" ({hint})" if hint else "")
        verdict = Verdict(name, Status.FAIL, reason, code)
    return replace(verdict, figures={**verdict.figures, "seconds": time.perf_counter() - started})


def exit_code(verdicts: Iterable[Verdict], *, strict: bool = False) -> int:
    """Exit code of a command that ran gates.

    Args:
        verdicts: The verdicts.
        strict: Whether a gate that did not run fails the command. By default it does not: a machine without a GPU
            cannot measure TensorRT's latency, for example.

    Returns:
        0 if no gate failed, the exit code of the failed gates, or 12 if several with different codes failed.
    """
    codes = {
        verdict.exit_code
        for verdict in verdicts
        if verdict.status.failed or (strict and verdict.status is Status.NOT_RUN)
    }
    if not codes:
        return 0
    return codes.pop() if len(codes) == 1 else SEVERAL_FAILED


_STYLES = {Status.PASS: "green", Status.FAIL: "bold red", Status.NOISY: "bold red", Status.NOT_RUN: "yellow"}


def table(verdicts: Iterable[Verdict]) -> Table:
    """The verdicts for a terminal."""
    result = Table(title="Gates", title_justify="left", expand=False)
    result.add_column("Gate", no_wrap=True)
    result.add_column("Verdict", no_wrap=True)
    result.add_column("Result")
    for verdict in verdicts:
        result.add_row(verdict.gate, Text(verdict.status.upper(), _STYLES[verdict.status]), Text(verdict.summary))
    return result
