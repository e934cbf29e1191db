"""Runs a case of the parity gate as often as its result needs, with other tokens or with noise in the reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.compiler.gates.cases import Case, Prompts
from moec.compiler.gates.compare import CaseResult, Output, compare, run_case
from moec.compiler.gates.noise import explained
from moec.compiler.gates.reference import Oracle, Trace
from moec.compiler.gates.tolerance import Tolerance
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
    """Compares a runner with the reference, case by case.

    A case is repeated with other tokens while ties excuse too many of its positions: one tie at the start of a sequence
    can excuse the rest of it, and with it a fault that only this case shows. A case that is out of tolerance even so is
    judged by how much rounding moves the reference itself. After the first case that this does not explain, the
    candidate is wrong, and noise is not asked any more.

    Args:
        runner: The candidate.
        oracle: The reference.
        prompts: Source of other tokens.
        tolerance: The limits.
        noise: Size of the noise that stands for rounding.
        max_excused: Largest share of the positions of a case that ties may excuse.
        retries: How often a case is repeated with other tokens.
    """

    def __init__(
        self,
        runner: Runner,
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

    def run(self, case: Case) -> Compared:
        """The result of a case."""
        found = self._with_other_tokens(case)
        if not self._wrong and not self._accepts(found.result):
            found = self._with_noise(found)
            self._wrong = not self._within(found.result)
        return found

    def _with_other_tokens(self, case: Case) -> Compared:
        """The first try that is out of tolerance, or else the one with the fewest excused positions."""

        def rank(found: Compared) -> tuple[bool, int]:
            return self._within(found.result), found.result.excused

        best = self._compared(case)
        for _ in range(self._retries):
            if not self._within(best.result) or self._proves(best.result):
                break
            best = min(best, self._compared(case.with_other_tokens(self._prompts)), key=rank)
        return best

    def _compared(self, case: Case) -> Compared:
        output = run_case(self._runner, case)
        trace = self._oracle.trace(output.input_ids[:, : output.logits.shape[1]], case.attention_mask, case.steps)
        return Compared(case, output, trace, *compare(case, output, trace, self._tolerance))

    def _with_noise(self, found: Compared) -> Compared:
        """The same outputs, judged by what rounding explains."""
        case, ids = found.case, found.output.input_ids[:, : found.output.logits.shape[1]]
        for differences in explained(self._oracle, self._noise, ids, case.attention_mask, case.steps):
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
