"""Runs cases of the parity gate together, and each as often as it needs: with other tokens, or with noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moec.compiler.gates.cases import Case, Prompts
from moec.compiler.gates.compare import CaseResult, Output, compare, run_case
from moec.compiler.gates.noise import explained
from moec.compiler.gates.reference import Batch, Oracle, Told, Trace
from moec.compiler.gates.tolerance import Tolerance
from moec.compiler.ir.lockstep import steps_of
from moec.targets.runners import Runner


@dataclass(frozen=True, eq=False)
class Compared:
    """A case, what both sides computed for it, and the result.

    Attributes:
        case: The case.
        output: The candidate's output.
        trace: The reference's output.
        result: The result.
        proven: The positions that are proven, [B, T] bool.
    """

    case: Case
    output: Output
    trace: Trace
    result: CaseResult
    proven: np.ndarray


class Trial:
    """Compares a candidate with the reference.

    Cases run through the reference together, which then reads each weight once. A case is repeated with other tokens
    while ties excuse too many of its positions: one tie at the start of a sequence can excuse the rest of it, and with
    it a fault that only this case shows. A case that is out of tolerance even so is judged by how much rounding moves
    the reference itself. After the first case that this does not explain, the candidate is wrong, and noise is not
    asked any more.

    Args:
        runner: The candidate; None: the Program of `oracle`, which the interpreter runs beside the reference.
        oracle: The reference.
        prompts: Source of other tokens.
        tolerance: The limits.
        noise: Size of the noise that stands for rounding.
        max_excused: Largest share of the positions of a case that ties may excuse.
        retries: How often a case is repeated with other tokens.
    """

    def __init__(
        self,
        runner: Runner | None,
        oracle: Oracle,
        prompts: Prompts,
        tolerance: Tolerance,
        noise: float,
        max_excused: float,
        retries: int,
    ) -> None:
        self._runner, self._oracle, self._prompts = runner, oracle, prompts
        self._tolerance, self._noise, self._max_excused, self._retries = tolerance, noise, max_excused, retries
        self._wrong = False

    def run(self, cases: Sequence[Case], told: Told = lambda *_: None) -> list[Compared]:
        """The results of cases whose logits are in memory together.

        Args:
            cases: The cases.
            told: Called with the number of finished steps, and of all steps.
        """
        found = self._with_other_tokens(cases, told)
        for index, one in enumerate(found):
            if not self._wrong and not self._accepts(one.result):
                found[index] = self._with_noise(one)
                self._wrong = not self._within(found[index].result)
        return found

    def _with_other_tokens(self, cases: Sequence[Case], told: Told) -> list[Compared]:
        """Of each case the first try that is out of tolerance, or else the one with the fewest excused positions."""

        def rank(found: Compared) -> tuple[bool, int]:
            return self._within(found.result), found.result.excused

        best = self._compared(cases, told)
        for _ in range(self._retries):
            again = [
                index
                for index, found in enumerate(best)
                if self._within(found.result) and not self._proves(found.result)
            ]
            if not again:
                break
            tries = self._compared([cases[index].with_other_tokens(self._prompts) for index in again], told)
            for index, found in zip(again, tries, strict=True):
                best[index] = min(best[index], found, key=rank)
        return best

    def _compared(self, cases: Sequence[Case], told: Told) -> list[Compared]:
        if self._runner is None:
            steps = [steps_of(case.input_ids, case.attention_mask, case.steps) for case in cases]
            traces, logits = self._oracle.traces([_batch(case, case.input_ids) for case in cases], steps, told)
            outputs = [Output(case.input_ids, own) for case, own in zip(cases, logits, strict=True)]
        else:
            outputs = self._outputs(self._runner, cases, told)
            batches = [_batch(case, output.fed) for case, output in zip(cases, outputs, strict=True)]
            traces, _ = self._oracle.traces(batches, told=lambda done, total: told(total + done, 2 * total))
        return [
            Compared(case, output, trace, *compare(case, output, trace, self._tolerance))
            for case, output, trace in zip(cases, outputs, traces, strict=True)
        ]

    @staticmethod
    def _outputs(runner: Runner, cases: Sequence[Case], told: Told) -> list[Output]:
        found = []
        for index, case in enumerate(cases):
            told(index, 2 * len(cases))
            found.append(run_case(runner, case))
        return found

    def _with_noise(self, found: Compared) -> Compared:
        """The same outputs, judged by what rounding explains."""
        case, batch = found.case, _batch(found.case, found.output.fed)
        for differences in explained(self._oracle, self._noise, batch):
            compared = compare(case, found.output, found.trace, self._tolerance, differences)
            found = Compared(case, found.output, found.trace, *compared)
            if self._accepts(found.result):
                break
        return found

    def _within(self, result: CaseResult) -> bool:
        """Whether no position is wrong; an error that is not a number is wrong."""
        return result.error <= self._tolerance.limit

    def _proves(self, result: CaseResult) -> bool:
        """Whether few positions are excused."""
        return result.excused <= self._max_excused * result.positions

    def _accepts(self, result: CaseResult) -> bool:
        told = result.mismatch is None or not self._tolerance.identical_tokens
        return self._within(result) and self._proves(result) and told


def _batch(case: Case, fed: np.ndarray) -> Batch:
    """What the reference gets of a case whose candidate was `fed` these ids, generated ones included."""
    return Batch(fed, case.attention_mask, case.steps)
