"""Cases are repeated with other tokens where ties excuse much, and judged by noise where a limit is exceeded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.cases import Case, Prompts
from moec.compiler.gates.compare import CaseResult, Output, compare
from moec.compiler.gates.noise import RUNS, Noise, noise_of
from moec.compiler.gates.reference import Oracle, Told, Trace
from moec.compiler.gates.tolerance import TOLERANCES, Precision, Tolerance
from moec.compiler.gates.trials import Compared, Trial
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program

Captured = tuple[Checkpoint, Program]
RETRIES = 3
TIGHT = Tolerance(1e-8, 1e-8, True, "less than rounding")


class Scripted(Trial):
    """A trial whose tries have these errors and excused positions, of 40."""

    def __init__(self, *found: tuple[float, int]) -> None:
        tolerance = TOLERANCES[Precision.FP16]
        super().__init__(None, None, Prompts(50, seed=1), tolerance, 0.0, 0.2, RETRIES)  # type: ignore[arg-type]
        self.found, self.fed, self.asked = found, list[Case](), 0

    def one(self, case: Case) -> Compared:
        """The result of a case that runs beside two right ones."""
        right = dataclasses.replace(case, name="right")
        found = self.run([right, case, right])
        assert [one.result.name for one in found] == ["right", case.name, "right"]
        return found[1]

    def _compared(self, cases: Sequence[Case], told: Told) -> list[Compared]:  # noqa: ARG002 - as in the class
        return [self._try(case) for case in cases]

    def _try(self, case: Case) -> Compared:
        error, excused = 0.0, 0
        if case.name != "right":
            error, excused = self.found[len(self.fed)]
            self.fed.append(case)
        result = CaseResult(case.name, error, 0.0, positions=40, excused=excused, tied=excused, top1=1.0)
        return Compared(
            case, Output(case.input_ids, np.zeros(0)), Trace(np.zeros(0), np.zeros(0), {}), result, np.zeros(0)
        )

    def _with_noise(self, found: Compared) -> Compared:
        self.asked += 1
        return found


CASE = Case("padded", np.array([[0, 7, 7, 7]]), np.array([[0, 1, 1, 1]]), (4,))


def test_a_case_that_ties_excuse_is_repeated_with_other_tokens() -> None:
    trial = Scripted((1e-3, 20), (2e-3, 15), (3e-3, 8), (0.0, 0))
    result = trial.one(CASE).result
    assert (result.error, result.excused, len(trial.fed)) == (3e-3, 8, 3)
    tokens = {tuple(case.input_ids[0].tolist()) for case in trial.fed}
    assert len(tokens) == 3
    assert all(case.input_ids[0, 0] == 0 and case.steps == (4,) for case in trial.fed)
    assert not trial.asked


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_an_error_in_any_try_counts(error: float) -> None:
    trial = Scripted((1e-3, 20), (error, 30), (0.0, 0))
    assert not trial.one(CASE).result.error <= 1e-2
    assert len(trial.fed) == 2


def test_a_case_is_not_repeated_without_end_nor_without_need() -> None:
    trial = Scripted((1e-3, 30), (1e-3, 22), (1e-3, 25), (1e-3, 31), (0.0, 0))
    assert (trial.one(CASE).result.excused, len(trial.fed), trial.asked) == (22, 1 + RETRIES, 1)
    trial = Scripted((1e-3, 8), (0.0, 0))
    trial.one(CASE)
    assert len(trial.fed) == 1


def test_noise_is_asked_until_a_case_is_wrong() -> None:
    trial = Scripted((1e-3, 0), (0.5, 0), (0.5, 0))
    for asked in (0, 1, 1):
        trial.one(CASE)
        assert trial.asked == asked


def trial_of(program: Program, runner: ProgramRunner, oracle: Oracle) -> Trial:
    return Trial(
        runner, oracle, Prompts(program.vocab_size, seed=3), TIGHT, noise_of(program, Precision.FP32), 0.2, RETRIES
    )


def case_of(program: Program, new_tokens: int = 0) -> Case:
    ids = Prompts(program.vocab_size, seed=2).random(1, 12)
    return Case("case", ids, None, (9, 1, 2), new_tokens)


def test_what_noise_of_the_size_of_rounding_causes_is_explained(mixtral: Captured) -> None:
    """The limit is below any rounding, so that every position is judged by the noise."""
    program = mixtral[1]
    runner, oracle = ProgramRunner(program), Oracle(program, TIGHT.tie_margin)
    runner.disturbance = Noise(noise_of(program, Precision.FP32), seed=5)
    result = trial_of(program, runner, oracle).run([case_of(program, new_tokens=8)])[0].result
    assert result.error <= TIGHT.limit
    assert result.sensitive > 10
    assert TIGHT.limit < result.sensitive_error < 1e-4
    assert result.mismatch is None


@pytest.mark.parametrize("factor", [10, 1000])
def test_a_larger_error_is_not_explained(factor: int, mixtral: Captured) -> None:
    program = mixtral[1]
    runner, oracle = ProgramRunner(program), Oracle(program, TIGHT.tie_margin)
    runner.disturbance = Noise(factor * noise_of(program, Precision.FP32), seed=5)
    runs: list[Any] = []
    plain = oracle.disturbed
    oracle.disturbed = lambda *given: runs.extend(given[0]) or plain(*given)  # type: ignore[method-assign, func-returns-value]
    result = trial_of(program, runner, oracle).run([case_of(program)])[0].result
    assert result.error > TIGHT.limit
    assert [isinstance(one, Noise) for one in runs] == [False] + [True] * sum(RUNS)


def test_padding_is_explained_row_by_row(mixtral: Captured) -> None:
    program = mixtral[1]
    ids = Prompts(program.vocab_size, seed=2).random(2, 9)
    mask = (np.arange(9)[None] >= np.array([[0], [4]])).astype(np.int64)
    runner, oracle = ProgramRunner(program), Oracle(program, TIGHT.tie_margin)
    runner.disturbance = Noise(noise_of(program, Precision.FP32), seed=5)
    result = trial_of(program, runner, oracle).run([Case("padded", ids * mask, mask, (7, 1, 1))])[0].result
    assert result.error <= TIGHT.limit
    assert result.positions == 14
    assert result.sensitive > 5


def test_noise_is_that_of_the_seed_and_of_its_size() -> None:
    value = torch.tensor([[1.0, -8.0, 2.0], [0.0, 0.0, 0.0]])
    first, again, other = (Noise(0.01, seed)(value) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 < float((first - value)[0].abs().max()) <= 0.08
    assert torch.equal(first[1], value[1])
    assert Noise(5e-4, 1)(value.half()).dtype is torch.float16


@pytest.mark.parametrize(("explained", "sensitive", "error"), [(0.0, 0, 0.3), (0.1, 0, 0.3), (0.4, 1, 0.0)])
def test_only_what_is_explained_is_left_out(explained: float, sensitive: int, error: float) -> None:
    want = np.array([[[2.0, 0.0], [2.0, 0.0]]], np.float32)
    got = want + np.array([[[0.6, 0.0], [0.0, 0.0]]], np.float32)
    ids = np.zeros((1, 2), np.int64)
    trace = Trace(want, np.zeros((1, 2), bool), {})
    given = np.full((1, 2), explained)
    case = Case("case", ids, None, (2,))
    result, proven = compare(case, Output(ids, got), trace, TOLERANCES[Precision.FP16], given)
    assert result.sensitive == sensitive
    assert result.error == pytest.approx(error)
    assert proven.tolist() == [[not sensitive, True]]


@pytest.mark.parametrize(("explained", "mismatch"), [(0.0, 0), (0.04, 0), (0.06, None)])
def test_a_generated_token_may_be_one_that_rounding_exchanges(explained: float, mismatch: int | None) -> None:
    """The chosen token 1 is 10 % of the largest logit below token 0: rounding may raise one and lower the other."""
    want = np.array([[[2.0, 1.8], [2.0, 0.0]]], np.float32)
    ids = np.array([[0, 1]])
    trace = Trace(want[:, :1], np.zeros((1, 1), bool), {})
    case = Case("case", ids[:, :1], None, (1,), new_tokens=1)
    output = Output(ids, want[:, :1])
    result, _ = compare(case, output, trace, TOLERANCES[Precision.FP32], np.full((1, 1), explained))
    assert result.mismatch == mismatch


def test_an_artifact_in_half_precision_has_the_noise_of_half_precision(mixtral: Captured) -> None:
    """A file of another exporter is compared with a Program in float32."""
    assert noise_of(mixtral[1], Precision.FP16) == 5e-4
    assert noise_of(mixtral[1].replace(dtype=torch.float16), Precision.INT8) == 5e-4
