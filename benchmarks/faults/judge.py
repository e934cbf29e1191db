"""Puts a fault into an artifact and runs the gates."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.fault import Fault
from faults.models import Ready, Workshop
from moec.compiler.common.errors import MoecError, first_line
from moec.compiler.common.verdict import Verdict
from moec.compiler.gates.parity import ParityOptions
from moec.compiler.gates.repeatability import RepeatabilityOptions
from moec.compiler.gates.run import GateInputs, run_gates
from moec.compiler.pipeline.stages import silent
from moec.targets.runners import Runner

PARITY = ParityOptions(greedy_tokens=16, long_prompt=130, capture=False)
"""The capture is not compared with transformers: no fault is put into a capture."""
REPEATABILITY = RepeatabilityOptions(runs=4, tokens=130)
LOWERING = "lowering"
"""Stands for a gate where the target refuses the faulty Program."""


class FaultyTarget:
    """A target whose runner has a fault; everything else is that of the target."""

    def __init__(self, ready: Ready, fault: Fault) -> None:
        self._target, self._fault = ready.target, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def open_reference(self, directory: Path, *, threads: int = 0) -> Runner:
        runner = self._target.open_reference(directory, threads=threads)
        return runner if self._fault.runner is None else self._fault.runner(runner)


@dataclass(frozen=True)
class Outcome:
    """What the gates say of one fault on one target.

    Attributes:
        caught: The gates that failed.
        said: The summary of the first of these gates.
        refused: Why the target does not take the model at all, or empty.
    """

    caught: tuple[str, ...] = ()
    said: str = ""
    refused: str = ""


def judge(fault: Fault, target: str, workshop: Workshop, directory: Path) -> Outcome:
    """Build the artifact of `fault` in `directory`, which must not exist, run the gates on it and remove it."""
    try:
        ready = workshop.ready(fault.model, target)
    except MoecError as error:
        return Outcome(refused=first_line(error))
    directory.mkdir(parents=True)
    try:
        verdicts = _verdicts(fault, ready, directory)
    except MoecError as error:
        return Outcome((LOWERING,), first_line(error))
    finally:
        shutil.rmtree(directory)
    failed = [verdict for verdict in verdicts if verdict.status.failed]
    return Outcome(tuple(verdict.gate for verdict in failed), failed[0].summary if failed else _closest(verdicts))


def _verdicts(fault: Fault, ready: Ready, directory: Path) -> tuple[Verdict, ...]:
    program = ready.built.program
    lowered = ready.target.lower(
        program if fault.program is None else fault.program(program), ready.options, directory, silent
    )
    if fault.files is not None:
        fault.files(directory, program)
    inputs = GateInputs(
        ready.built.checkpoint,
        ready.built.captured,
        program,
        FaultyTarget(ready, fault),
        directory,
        facts=lowered.facts,
    )
    return run_gates(inputs, PARITY, repeatability=REPEATABILITY)


def _closest(verdicts: tuple[Verdict, ...]) -> str:
    return next(verdict.summary for verdict in verdicts if verdict.gate == "parity: artifact")
