"""Latency: is the artifact within its budgets of time and size, and no slower than a baseline?

Candidate and baseline are called alternately in one process that holds only their Runners; each start is measured in a
process of its own. A demand is met if the whole confidence interval is within the limit, and missed if all of it is
beyond. A machine that is too noisy, or that cannot measure, has a verdict of its own, which is not a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moec.compiler.common.artifact import MANIFEST, is_artifact, read_manifest
from moec.compiler.common.errors import UsageError
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.measure.latency import process
from moec.compiler.measure.latency.demands import TIMES, Cold, Demand, Workload, parse_budgets, regressions
from moec.compiler.measure.latency.sampling import LOOKS
from moec.compiler.measure.latency.statistics import RATIO_LEVEL, Interval, quantile, samples_needed
from moec.compiler.measure.latency.timings import (
    BASELINE,
    CANDIDATE,
    Clock,
    Decision,
    Measured,
    Series,
    decide,
    judge,
    ratio,
)
from moec.targets.base import Target, cannot_measure

GATE = "latency"
EXIT_CODE = 6
CONTEXTS = (128, 512)
STARTS, JUDGED_STARTS = 3, 8
QUANTILES = (0.5, 0.9, 0.99)

Measure = Callable[[Mapping[str, Any], Callable[[int, int], None]], dict[str, Any]]
"""Runs a job, as `moec.compiler.measure.latency.process.measure` does."""


@dataclass(frozen=True)
class LatencyOptions:
    """Settings of the gate.

    Attributes:
        budgets: Budgets, from `parse_budgets`.
        baseline: Artifact to compare with, or None.
        max_regression: How much slower than the baseline the artifact may be: 0.05 is 5 %.
        threads: Threads of the runtimes.
        contexts: Prompt lengths in tokens to measure, besides those that budgets name.
        seconds: Longest time of sampling in seconds; the time of the starts is added to it.
    """

    budgets: tuple[Demand, ...] = ()
    baseline: Path | None = None
    max_regression: float = 0.05
    threads: int = 1
    contexts: tuple[int, ...] = CONTEXTS
    seconds: float = 120.0

    @property
    def every_context(self) -> tuple[int, ...]:
        """`contexts` and the prompt lengths of the budgets, sorted."""
        named = (demand.subject.context for demand in self.budgets if isinstance(demand.subject, Workload))
        return tuple(sorted({*self.contexts, *named}))


def make_options(
    budget: str | Mapping[str, str | float] | None,
    baseline: str | None,
    max_regression: float,
    threads: int,
    contexts: Sequence[int],
    seconds: float,
) -> LatencyOptions | None:
    """The gate's settings from the latency section of a recipe; None without a budget and a baseline.

    Raises:
        UsageError: A budget is not valid, or the baseline is not a complete artifact.
    """
    if budget is None and baseline is None:
        return None
    location = None if baseline is None else _artifact(baseline)
    budgets = () if budget is None else parse_budgets(budget)
    return LatencyOptions(budgets, location, max_regression, threads, tuple(contexts), seconds)


def _artifact(given: str) -> Path:
    path = Path(given).expanduser()
    directory = path.parent if path.name == MANIFEST else path
    if not is_artifact(directory):
        raise UsageError(f"{given}: the baseline is not an artifact", hint="give its directory, or the moec.json in it")
    if missing := [name for name in read_manifest(directory)["model_files"] if not (directory / name).exists()]:
        raise UsageError(
            f"{directory}: the baseline cannot be run: {', '.join(missing)} missing",
            hint="keep its model files: it must be measured again, since figures of an earlier run cannot be compared",
        )
    return directory


def not_run(reason: str = "") -> Verdict:
    """The verdict "not run", by default because neither a budget nor a baseline is given."""
    nothing = "no budget and no baseline is given (--latency-budget decode.p50=12ms, --latency-baseline DIR)"
    return Verdict(GATE, Status.NOT_RUN, reason or nothing, EXIT_CODE)


def judge_latency(
    target: Target,
    directory: Path,
    options: LatencyOptions,
    progress: Progress,
    measure: Measure = process.measure,
) -> Verdict:
    """Measure the artifact, and the baseline if there is one, and judge the demands.

    Args:
        target: Target of the artifact.
        directory: The artifact.
        options: The demands.
        progress: Called with the seconds spent and the seconds allowed.
        measure: Runs a job in a process of its own.

    Raises:
        UsageError: A budget names a prompt length that does not fit the model or the artifact.
    """
    if reason := cannot_measure(target):
        return not_run(f"not measured: {reason}")
    artifacts = {CANDIDATE: str(directory), **({BASELINE: str(options.baseline)} if options.baseline else {})}
    contexts = options.every_context
    compared = regressions(contexts, options.max_regression) if options.baseline else ()
    demands = [d for d in (*options.budgets, *compared) if isinstance(d.subject, Workload)]
    job = {
        "kind": "warm",
        "artifacts": artifacts,
        "contexts": list(contexts),
        "demands": [process.plain_demand(demand) for demand in demands],
        "threads": options.threads,
        "seconds": options.seconds,
    }
    found = measure(job, lambda done, total: progress(GATE, done, total))
    measured = {
        name: {artifact: Series.of(each) for artifact, each in by_artifact.items()}
        for name, by_artifact in found["series"].items()
    }
    starts = {name: _starts(name, path, options, measure) for name, path in artifacts.items()}
    unasked = {demand for demand in compared if str(demand.subject) not in measured}
    fitting = [demand for demand in demands if demand not in unasked]
    outcomes = [_outcome(demand, measured, options.threads) for demand in fitting]
    outcomes += [_cold_outcome(demand, starts[CANDIDATE]) for demand in options.budgets if demand not in demands]
    return _verdict(outcomes, {**found, "starts": starts}, measured, options)


def judge_samples(measured: Measured, found: Mapping[str, Any], options: LatencyOptions) -> Verdict:
    """The verdict on samples that were measured elsewhere; without budgets it is "not run", with the figures.

    Args:
        measured: Workload -> `CANDIDATE` -> its series.
        found: `starts`, `unstable`, `left_out`, `cpus`, `load_average` and `runners`, as `process.warm` returns them.
        options: The budgets, all on workloads.

    Raises:
        UsageError: A budget names a prompt length that was not measured.
    """
    outcomes = [_outcome(demand, measured, options.threads) for demand in options.budgets]
    if outcomes:
        return _verdict(outcomes, found, measured, options)
    medians = {name: quantile(each[CANDIDATE].calls(), 0.5).value for name, each in measured.items()}
    said = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in medians.items())
    reason = f"{said} (median, threads: {options.threads}); no budget is given" if said else "no context fits the model"
    return replace(not_run(reason), figures=_figures([], found, measured, options))


def _starts(name: str, path: str, options: LatencyOptions, measure: Measure) -> dict[str, list[float]]:
    """See `process.starts`; more of them if a budget is about their times."""
    judged = name == CANDIDATE and any(demand.subject in TIMES for demand in options.budgets)
    count = JUDGED_STARTS if judged else STARTS
    return process.starts(Path(path), options.every_context[0], options.threads, count, measure)


@dataclass(frozen=True)
class _Outcome:
    demand: Demand
    interval: Interval
    decision: Decision
    clock: Clock = Clock.WALL

    def __str__(self) -> str:
        limit, interval = self.demand.limit, self.interval
        if self.demand.statistic == "ratio":
            clock = ", CPU time" if self.clock is Clock.CPU else ""
            return (
                f"{self.demand.key} {interval.value - 1:+.1%} [{interval.low - 1:+.1%}, {interval.high - 1:+.1%}] "
                f"(limit {limit - 1:+.1%}{clock})"
            )
        if self.demand.subject in (Cold.SIZE, Cold.PEAK_RSS):
            return f"{self.demand.key} {interval.value / 1e6:.1f} MB (limit {limit / 1e6:.1f} MB)"
        return (
            f"{self.demand.key} {interval.value * 1e3:.4g} ms [{interval.low * 1e3:.4g}, {interval.high * 1e3:.4g}] "
            f"(limit {limit * 1e3:.4g} ms)"
        )


def _outcome(demand: Demand, measured: Measured, threads: int) -> _Outcome:
    if str(demand.subject) not in measured:
        raise UsageError(
            f"latency budget: {demand.key}: a prompt of this length does not fit the model or the artifact",
            hint="give a budget for a shorter prompt, such as decode64.p50",
        )
    interval, decision = judge(demand, measured, threads)
    clock = ratio(measured[str(demand.subject)], threads).clock if demand.statistic == "ratio" else Clock.WALL
    return _Outcome(demand, interval, decision, clock)


def _cold_outcome(demand: Demand, starts: Mapping[str, Sequence[float]]) -> _Outcome:
    values = starts[str(demand.subject)]
    if demand.subject in TIMES:
        interval = quantile(values, 0.5)
        return _Outcome(demand, interval, decide(interval, demand.limit))
    largest = Interval(max(values), max(values), max(values))
    return _Outcome(demand, largest, decide(largest, demand.limit))


def _verdict(
    outcomes: Sequence[_Outcome], found: Mapping[str, Any], measured: Measured, options: LatencyOptions
) -> Verdict:
    decisions = {outcome.decision for outcome in outcomes}
    status, said = Status.PASS, list(outcomes)
    if not outcomes:
        return not_run("not measured: no context fits the model")
    if Decision.MISSED in decisions or decisions & {Decision.AT_LIMIT, Decision.TOO_FEW}:
        status = Status.FAIL
    elif Decision.NOISY in decisions:
        status = Status.NOISY
    if status is not Status.PASS:
        # Failed demands come first in the summary.
        said.sort(key=lambda outcome: list(_WORST).index(outcome.decision))
    parts = [f"{_WORST[one.decision](one)}{one}" for one in said]
    if found["unstable"]:
        parts.append(f"{found['unstable']} warm-ups did not reach a steady time")
    return Verdict(GATE, status, "; ".join(parts), EXIT_CODE, _figures(outcomes, found, measured, options))


_WORST: Mapping[Decision, Callable[[_Outcome], str]] = {
    Decision.MISSED: lambda one: "slower: " if one.demand.statistic == "ratio" else "over budget: ",
    Decision.TOO_FEW: lambda one: f"{_too_few(one.demand)}: ",
    Decision.AT_LIMIT: lambda _: "not proven, the interval reaches beyond the limit: ",
    Decision.NOISY: lambda one: f"machine too noisy: {one.demand.statistic} interval ±{one.interval.spread:.0%}: ",
    Decision.MET: lambda _: "",
}


def _too_few(demand: Demand) -> str:
    if demand.statistic == "ratio":
        return f"too few sessions in the time (needs {LOOKS[0]}: allow more seconds)"
    share = float(demand.statistic[1:]) / 100
    return f"too few calls in the time (needs {samples_needed(share)}: allow more seconds)"


def _figures(
    outcomes: Sequence[_Outcome], found: Mapping[str, Any], measured: Measured, options: LatencyOptions
) -> dict[str, Any]:
    return {
        "demands": [
            {
                **asdict(one.demand),
                "subject": str(one.demand.subject),
                **asdict(one.interval),
                "clock": one.clock,
                "decision": str(one.decision),
            }
            for one in outcomes
        ],
        "workloads": {
            workload: {name: _quantiles(series) for name, series in each.items()} for workload, each in measured.items()
        },
        "ratios": {
            workload: asdict(ratio(each, options.threads)) | {"level": RATIO_LEVEL}
            for workload, each in measured.items()
            if BASELINE in each
        },
        "samples": {
            workload: {name: _plain(series) for name, series in each.items()} for workload, each in measured.items()
        },
        "starts": found["starts"],
        "threads": options.threads,
        "pinned_to_cpus": found["cpus"],
        "load_average": found["load_average"],
        "unstable_warm_ups": found["unstable"],
        "contexts_left_out": found["left_out"],
        "runners": found["runners"],
    }


def _quantiles(series: Series) -> dict[str, Any]:
    """Quantiles of wall and CPU time in seconds, and the number of calls."""
    clocks: dict[str, Any] = {
        clock: {f"p{share * 100:g}": asdict(quantile(series.calls(clock), share)) for share in QUANTILES}
        for clock in Clock
    }
    return {**clocks, "calls": len(series.calls()), "share_without_core": series.without_core()}


def _plain(series: Series) -> dict[str, list[list[float]]]:
    """Clock -> for every session, the seconds of its calls."""
    return {
        clock: [[round(seconds, 7) for turn in session for seconds in turn] for session in series.sessions(clock)]
        for clock in Clock
    }
