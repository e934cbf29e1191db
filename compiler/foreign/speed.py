"""How fast a foreign file is: prefill and decode, measured as the latency gate measures moec's own artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psutil

from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Verdict
from moec.compiler.gates import latency
from moec.compiler.measure.latency.demands import Demand, Workload
from moec.compiler.measure.latency.sampling import Plan, growth, longest, pinned, sample
from moec.compiler.measure.latency.timings import CANDIDATE
from moec.targets.runners import Runner, limits_of

CONTEXTS = (128,)
SECONDS = 20.0
"""Longest time of sampling."""


def measure(
    opened: Callable[[], Runner],
    vocab_size: int,
    context_length: int | None,
    budgets: Sequence[Demand],
    progress: Progress,
    *,
    threads: int = 1,
    seconds: float = SECONDS,
) -> Verdict:
    """Measure a file, and judge budgets if there are any.

    Args:
        opened: Opens the file anew.
        vocab_size: Vocabulary size; prompts are random tokens.
        context_length: Tokens that the model takes, or None.
        budgets: Demands on prefill and decode.
        progress: Called with the seconds spent and the seconds allowed.
        threads: Threads of the runtime.
        seconds: Longest time of sampling.
    """
    runner = opened()
    if stand_in := limits_of(runner).stands_in:
        return latency.not_run(f"not measured: {stand_in} is used here instead of the runtime that users have")
    asked = {demand.subject.context for demand in budgets if isinstance(demand.subject, Workload)}
    most = longest(runner, context_length)
    contexts = tuple(sorted({*CONTEXTS, *asked}))
    fitting = tuple(one for one in contexts if most is None or one + growth(one) <= most)
    if not fitting and not asked and most is not None and most // 2 + growth(most // 2) <= most:
        contexts = fitting = (most // 2,)
    facts: dict[str, Any] = dict(runner.facts())
    del runner
    with pinned(threads) as cpus:
        plan = Plan(fitting, tuple(budgets), threads, seconds, vocab_size)
        found = sample(lambda _: {CANDIDATE: opened()}, plan, lambda done, total: progress(latency.GATE, done, total))
    context = {
        "unstable": found.unstable,
        "left_out": sorted(set(contexts) - set(fitting)),
        "cpus": list(cpus),
        "load_average": psutil.getloadavg()[0],
        "runners": {CANDIDATE: facts},
        "starts": {},
    }
    return latency.judge_samples(found.series, context, latency.LatencyOptions(tuple(budgets), threads=threads))
