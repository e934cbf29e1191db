"""The same prompt gives the same logits, or the gate says how far they are apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moec.compiler.common.verdict import Status
from moec.compiler.gates.repeatability import RepeatabilityOptions, judge_repeatability
from moec.compiler.gates.tolerance import Precision
from moec.targets.runners import RunnerLimits

IDS = np.zeros((1, 4), np.int64)
LOGITS = np.linspace(-2, 2, 20, dtype=np.float32).reshape(1, 4, 5)


class Spoilt:
    """A runner whose logits are `spoil` of those of a right one and of the number of the run."""

    def __init__(self, spoil: Callable[[np.ndarray, int], np.ndarray], *, repeats_bits: bool = True) -> None:
        self._spoil, self.runs, self.limits = spoil, 0, RunnerLimits(repeats_bits=repeats_bits)

    def reset(self) -> None:
        pass

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        self.runs += 1
        return self._spoil(LOGITS.copy(), self.runs)

    decode = prefill

    def facts(self) -> dict[str, object]:
        return {}


def lost_once(run: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """One position of one run lacks a term."""

    def spoil(logits: np.ndarray, now: int) -> np.ndarray:
        logits[0, 2, 3] -= 0.02 * (now == run)
        return logits

    return spoil


def test_equal_runs_pass() -> None:
    runner = Spoilt(lambda logits, _: logits)
    verdict = judge_repeatability(runner, IDS, Precision.FP32)
    assert verdict.status is Status.PASS
    assert "20 runs of one prompt of 4 tokens: the same bits" in verdict.summary
    assert runner.runs == 20


@pytest.mark.parametrize("run", [1, 2, 20])
def test_one_lost_update_fails(run: int) -> None:
    verdict = judge_repeatability(Spoilt(lost_once(run)), IDS, Precision.FP32)
    assert verdict.status is Status.FAIL
    assert verdict.exit_code == 5
    # The first run is what the others are compared with: where it is wrong, all others differ.
    assert verdict.figures["different"] == (19 if run == 1 else 1)
    assert verdict.figures["max_error"] == pytest.approx(0.01, rel=0.1)


def test_an_order_left_to_chance_fails_on_a_cpu_and_passes_where_bits_need_not_repeat() -> None:
    def rounded(logits: np.ndarray, run: int) -> np.ndarray:
        return logits * np.float32(1 + 1e-6 * (run % 2))

    assert judge_repeatability(Spoilt(rounded), IDS, Precision.FP32).status is Status.FAIL
    gpu = judge_repeatability(Spoilt(rounded, repeats_bits=False), IDS, Precision.FP32)
    assert gpu.status is Status.PASS
    assert "limit 1e-05" in gpu.summary
    lost = judge_repeatability(Spoilt(lost_once(7), repeats_bits=False), IDS, Precision.FP32)
    assert lost.status is Status.FAIL


def test_nan_in_one_run_fails() -> None:
    def spoil(logits: np.ndarray, run: int) -> np.ndarray:
        logits[0, 0, 0] = np.nan if run == 3 else 0
        return logits

    verdict = judge_repeatability(Spoilt(spoil, repeats_bits=False), IDS, Precision.FP16)
    assert verdict.status is Status.FAIL
    assert verdict.figures["max_error"] == np.inf


def test_a_slow_artifact_is_run_less_often_and_the_verdict_says_so() -> None:
    options = RepeatabilityOptions(seconds=0.0, fewest=3)
    verdict = judge_repeatability(Spoilt(lambda logits, _: logits), IDS, Precision.FP32, options)
    assert verdict.status is Status.PASS
    assert verdict.summary.startswith("3 runs")


@pytest.mark.parametrize(("layers", "runs"), [(2, 20), (4, 20), (5, 16), (16, 5), (61, 5)])
def test_many_layers_need_fewer_runs(layers: int, runs: int) -> None:
    assert RepeatabilityOptions().of_layers(layers).runs == runs
    assert RepeatabilityOptions(runs=4).of_layers(layers).runs == 4
