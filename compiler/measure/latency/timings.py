"""The measured times of one kind of call, and the decision on a demand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from moec.compiler.measure.latency.demands import QUANTILES, Demand
from moec.compiler.measure.latency.statistics import Interval, paired_ratio, quantile

NOISE = 0.05
"""An undecided budget is "too noisy" if half the width of its interval exceeds this share of the value."""

BUSY = 0.05
"""Share of the time without a core above which the machine counts as busy."""


class Clock(StrEnum):
    """The clock of a time: wall-clock time, or the CPU time of the process."""

    WALL = "wall"
    CPU = "cpu"


CANDIDATE, BASELINE = "candidate", "baseline"


class Decision(StrEnum):
    """The decision on a demand."""

    MET = "met"
    MISSED = "missed"
    AT_LIMIT = "at the limit"
    NOISY = "too noisy"
    TOO_FEW = "too few samples"


@dataclass(frozen=True, slots=True)
class Call:
    """Wall-clock and CPU seconds of one call, and whether it gave up the core voluntarily."""

    wall: float
    cpu: float
    waited: bool


Turn = list[float]


@dataclass
class Series:
    """Calls of one workload by one artifact.

    Attributes:
        wall: Sessions (between two openings of the artifact) of turns of wall-clock seconds of calls. Turns of two
            artifacts with the same number were measured one after the other.
        cpu: The CPU seconds of the process, in the same structure.
        waits: Number of calls that gave up the core voluntarily, to wait for a device, a lock or a file.
    """

    wall: list[list[Turn]] = field(default_factory=list)
    cpu: list[list[Turn]] = field(default_factory=list)
    waits: int = 0

    def begin(self) -> None:
        """Start a session."""
        self.wall.append([])
        self.cpu.append([])

    def add(self, turn: Sequence[Call]) -> None:
        """Add a turn to the current session."""
        self.wall[-1].append([call.wall for call in turn])
        self.cpu[-1].append([call.cpu for call in turn])
        self.waits += sum(call.waited for call in turn)

    def sessions(self, clock: Clock) -> list[list[Turn]]:
        """Sessions of turns of seconds by one clock."""
        return self.cpu if clock is Clock.CPU else self.wall

    def calls(self, clock: Clock = Clock.WALL) -> list[float]:
        """Seconds of every call."""
        return [seconds for session in self.sessions(clock) for turn in session for seconds in turn]

    def without_core(self) -> float:
        """Share of the time in which other processes had the core; 0 if calls wait voluntarily, as for a device."""
        calls = self.calls()
        if self.waits > BUSY * len(calls):
            return 0.0
        return max(0.0, 1 - sum(self.calls(Clock.CPU)) / sum(calls))

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Series:
        """Make a series from the result of `dataclasses.asdict`."""
        return cls(plain["wall"], plain["cpu"], plain["waits"])


@dataclass(frozen=True)
class Ratio:
    """The time of the candidate relative to the baseline.

    Attributes:
        interval: The ratio with its confidence interval.
        clock: The clock: CPU time if the machine was busy with other processes.
        sessions: Number of sessions.
    """

    interval: Interval
    clock: Clock
    sessions: int


Measured = Mapping[str, Mapping[str, Series]]
"""Workload -> artifact, such as "candidate" and "baseline" -> its series."""


def ratio(series: Mapping[str, Series], threads: int, *, of: str = CANDIDATE, to: str = BASELINE) -> Ratio:
    """The ratio of the time of the artifact `of` to that of the artifact `to`.

    A session is one sample, because the place of its weights in memory makes an artifact a few percent faster or slower
    until it is opened anew. The ratio of a session is the median over its pairs of turns.

    With one thread, CPU time equals the wall-clock time of an idle machine, so it is used on a busy machine. With
    several threads it is not comparable, since threads wait for each other.
    """
    candidate, baseline = series[of], series[to]
    busy = max(candidate.without_core(), baseline.without_core()) > BUSY
    clock = Clock.CPU if busy and threads == 1 else Clock.WALL
    sessions = zip(candidate.sessions(clock), baseline.sessions(clock), strict=True)
    ratios = [_session_ratio(first, second) for first, second in sessions]
    return Ratio(paired_ratio(ratios), clock, len(ratios))


def _session_ratio(candidate: Sequence[Turn], baseline: Sequence[Turn]) -> float:
    logs = [math.log(np.median(one) / np.median(other)) for one, other in zip(candidate, baseline, strict=True)]
    return math.exp(float(np.median(logs)))


def decide(interval: Interval, limit: float, noise: float = NOISE) -> Decision:
    """Decide by the interval: a demand is met only if the whole interval is within the limit."""
    if interval.high <= limit:
        return Decision.MET
    if interval.low > limit:
        return Decision.MISSED
    if not math.isfinite(interval.high):
        return Decision.TOO_FEW
    return Decision.NOISY if interval.spread > noise else Decision.AT_LIMIT


def judge(demand: Demand, measured: Measured, threads: int) -> tuple[Interval, Decision]:
    """The interval and the decision for a demand on a workload."""
    series = measured[str(demand.subject)]
    if demand.statistic == "ratio":
        interval = ratio(series, threads).interval
        return interval, decide(interval, demand.limit, (demand.limit - 1) / 2)
    interval = quantile(series[CANDIDATE].calls(), QUANTILES[demand.statistic])
    return interval, decide(interval, demand.limit)
