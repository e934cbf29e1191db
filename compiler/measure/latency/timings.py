"""The times of one kind of call, and what they say of a demand."""

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
"""An undecided budget whose interval is wider than this, half of it and relative, tells of the machine."""

BUSY = 0.05
"""Share of the time without a core from which on the wall clock tells of the neighbours."""


class Clock(StrEnum):
    """What times are taken by: the clock on the wall, or the CPU seconds of the process."""

    WALL = "wall"
    CPU = "cpu"


CANDIDATE, BASELINE = "candidate", "baseline"


class Decision(StrEnum):
    """What the samples say of a demand."""

    MET = "met"
    MISSED = "missed"
    AT_LIMIT = "at the limit"
    NOISY = "too noisy"
    TOO_FEW = "too few samples"


@dataclass(frozen=True, slots=True)
class Call:
    """Seconds of one call, by the clock on the wall and of the process, and whether it gave up the core by itself."""

    wall: float
    cpu: float
    waited: bool


Turn = list[float]


@dataclass
class Series:
    """Calls of one workload by one artifact.

    Attributes:
        wall: Per session (between two openings of the artifact) its turns, and of a turn the seconds of its calls. The
            same turns of two artifacts are neighbours in time.
        cpu: CPU seconds of the process, likewise.
        waits: How many calls gave up the core by themselves, to wait for a device, a lock or a file.
    """

    wall: list[list[Turn]] = field(default_factory=list)
    cpu: list[list[Turn]] = field(default_factory=list)
    waits: int = 0

    def begin(self) -> None:
        """Begin a session."""
        self.wall.append([])
        self.cpu.append([])

    def add(self, turn: Sequence[Call]) -> None:
        """Add a turn to the session."""
        self.wall[-1].append([call.wall for call in turn])
        self.cpu[-1].append([call.cpu for call in turn])
        self.waits += sum(call.waited for call in turn)

    def sessions(self, clock: Clock) -> list[list[Turn]]:
        """The times by one clock."""
        return self.cpu if clock is Clock.CPU else self.wall

    def calls(self, clock: Clock = Clock.WALL) -> list[float]:
        """Seconds of every call."""
        return [seconds for session in self.sessions(clock) for turn in session for seconds in turn]

    def without_core(self) -> float:
        """Share of the time in which others had the core; 0 where calls also wait by themselves, as for a device."""
        calls = self.calls()
        if self.waits > BUSY * len(calls):
            return 0.0
        return max(0.0, 1 - sum(self.calls(Clock.CPU)) / sum(calls))

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Series:
        """From its plain form, that of `dataclasses.asdict`."""
        return cls(plain["wall"], plain["cpu"], plain["waits"])


@dataclass(frozen=True)
class Ratio:
    """Candidate to baseline.

    Attributes:
        interval: The ratio.
        clock: CPU seconds where the machine was busy with other things.
        sessions: How many.
    """

    interval: Interval
    clock: Clock
    sessions: int


Measured = Mapping[str, Mapping[str, Series]]
"""Workload -> artifact ("candidate", "baseline") -> its series."""


def ratio(series: Mapping[str, Series], threads: int) -> Ratio:
    """How many times as long the candidate takes as the baseline.

    A session is one sample: where the weights come to lie in memory makes an artifact a few percent faster or slower
    than itself, and stays the same until it is opened anew. Within a session the median over pairs of turns counts.

    With one thread the CPU time is what the wall time would be on an idle machine, so it counts where the machine is
    busy. With several threads it does not tell: some of them only wait for the others.
    """
    candidate, baseline = series[CANDIDATE], series[BASELINE]
    busy = max(candidate.without_core(), baseline.without_core()) > BUSY
    clock = Clock.CPU if busy and threads == 1 else Clock.WALL
    sessions = zip(candidate.sessions(clock), baseline.sessions(clock), strict=True)
    ratios = [_session_ratio(first, second) for first, second in sessions]
    return Ratio(paired_ratio(ratios), clock, len(ratios))


def _session_ratio(candidate: Sequence[Turn], baseline: Sequence[Turn]) -> float:
    logs = [math.log(np.median(one) / np.median(other)) for one, other in zip(candidate, baseline, strict=True)]
    return math.exp(float(np.median(logs)))


def decide(interval: Interval, limit: float, noise: float = NOISE) -> Decision:
    """Compare by the interval: what it does not settle is never met."""
    if interval.high <= limit:
        return Decision.MET
    if interval.low > limit:
        return Decision.MISSED
    if not math.isfinite(interval.high):
        return Decision.TOO_FEW
    return Decision.NOISY if interval.spread > noise else Decision.AT_LIMIT


def judge(demand: Demand, measured: Measured, threads: int) -> tuple[Interval, Decision]:
    """What the samples say of a demand on a workload."""
    series = measured[str(demand.subject)]
    if demand.statistic == "ratio":
        interval = ratio(series, threads).interval
        return interval, decide(interval, demand.limit, (demand.limit - 1) / 2)
    interval = quantile(series[CANDIDATE].calls(), QUANTILES[demand.statistic])
    return interval, decide(interval, demand.limit)
