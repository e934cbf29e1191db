"""Repeatability: the same prompt gives the same logits in every run, with the runtime's default threads.

A kernel whose threads write to the same location loses an update now and then. Parity finds such a race only by luck, a
few times in a hundred prompts. Here one long prompt is run many times in one session and compared with its first run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.gates.compare import position_errors
from moec.compiler.gates.tolerance import TOLERANCES, Precision
from moec.targets.runners import Runner, limits_of

GATE = "repeatability"
EXIT_CODE = 5

SHARE = 0.1
"""Share of the parity limit by which runs may differ if the runtime does not guarantee equal bits.

Runtimes on a CPU compute each element in one thread and in one order, so equal bits are required there: a difference in
the last bit means that threads add to the same location in a random order, and lost updates are rare on a busy machine.
A GPU may add in any order, which costs 2e-7 to 1e-5 in float32, as between correct implementations. A lost update
drops a whole term of a sum and costs 1e-3 or far more.
"""


FEW = 5
"""Number of runs below which many layers do not bring it."""


@dataclass(frozen=True)
class RepeatabilityOptions:
    """Settings of the gate.

    Attributes:
        runs: Number of runs.
        layer_runs: Runs of a MoE layer that are enough: a model of many layers runs its kernels often in every run.
        tokens: Length of the prompt, if model and runner take so many; it gives work to every thread.
        seconds: After this time no further run is started, once there are `fewest`.
        fewest: Smallest number of runs.
    """

    runs: int = 20
    layer_runs: int = 80
    tokens: int = 480
    seconds: float = 60.0
    fewest: int = 3

    def of_layers(self, count: int) -> RepeatabilityOptions:
        """The settings for a model of `count` MoE layers, with at least `FEW` runs."""
        return replace(self, runs=min(self.runs, max(FEW, -(-self.layer_runs // count))))


def judge_repeatability(
    runner: Runner,
    ids: np.ndarray,
    precision: Precision,
    options: RepeatabilityOptions | None = None,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """Run one prompt several times and compare every run with the first.

    Args:
        runner: The artifact, opened as users open it.
        ids: The prompt, [1, T] int64.
        precision: Precision of the artifact, which gives the limit.
        options: Settings; None for the defaults.
        progress: Called for every run.
    """
    options, limits = options or RepeatabilityOptions(), limits_of(runner)
    if limits.stands_in:
        reason = f"{limits.stands_in} is used here instead of the target's runtime, whose threads it cannot test"
        return Verdict(GATE, Status.NOT_RUN, reason, EXIT_CODE)
    limit = 0.0 if limits.repeats_bits else SHARE * TOLERANCES[precision].limit
    valid, started = np.ones(ids.shape, dtype=bool), time.perf_counter()
    first = runner.prefill(ids)
    errors, identical, rows = [], 0, 0
    for run in range(1, options.runs):
        if run >= options.fewest and time.perf_counter() - started > options.seconds:
            break
        progress(GATE, run, options.runs)
        logits = runner.prefill(ids)
        same = np.array_equal(logits, first)
        by_position = np.zeros(ids.shape) if same else position_errors(logits, first, valid)
        errors.append(float(by_position.max(initial=0.0)))
        identical += same
        rows += int((by_position > limit).sum())
    runner.reset()
    progress(GATE, options.runs, options.runs)
    return _verdict(ids.shape[1], errors, identical, rows, limit)


def _verdict(tokens: int, errors: list[float], identical: int, rows: int, limit: float) -> Verdict:
    wrong, worst = sum(not error <= limit for error in errors), max(errors, default=0.0)
    what = f"{len(errors) + 1} runs of one prompt of {tokens} tokens"
    figures = {
        "runs": len(errors) + 1,
        "tokens": tokens,
        "identical": identical,
        "different": wrong,
        "positions": rows,
        "max_error": worst,
        "limit": limit,
    }
    if wrong:
        summary = (
            f"{wrong} of {what} differ from the first, by up to {worst:.1e} of max |logit| (limit {limit:.0g}): "
            "the output of this artifact is not deterministic"
        )
        return Verdict(GATE, Status.FAIL, summary, EXIT_CODE, figures)
    found = "the same bits" if identical == len(errors) else f"max |difference| {worst:.1e} (limit {limit:.0e})"
    return Verdict(GATE, Status.PASS, f"{what}: {found}", EXIT_CODE, figures)
