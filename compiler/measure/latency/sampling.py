"""Times alternating calls of some runners (A B B A) until all demands are decided or the time is up.

After a few turns the artifacts are opened anew, since the place of the weights in memory changes the times of the same
artifact by a few percent.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import psutil

from moec.compiler.measure.latency.demands import Demand, Workload
from moec.compiler.measure.latency.timings import Call, Decision, Series, judge
from moec.targets.runners import Runner, last_logits, limits_of

STEPS = 4
"""Counted decode steps of a turn; one more before them loads the CPU caches with this artifact's weights."""

LOOKS = (10, 14, 20, 28, 40, 56, 80)
"""Numbers of sessions after which the demands are evaluated; the last one ends the sampling."""

STABLE = 0.05
WARM_UPS = 40
WARM_UP_SECONDS = DECODE_SECONDS = 2.0


@dataclass(frozen=True)
class Plan:
    """Settings of the measurement.

    Attributes:
        contexts: Prompt lengths in tokens.
        demands: Demands on workloads; sampling ends when they are decided.
        threads: Threads of the runners.
        seconds: Longest sampling time for all contexts.
        vocab_size: Vocabulary size; token ids are smaller.
        rounds: Number of sessions; None: until the demands are decided, which is looked at after those of `LOOKS`.
    """

    contexts: tuple[int, ...]
    demands: tuple[Demand, ...] = ()
    threads: int = 1
    seconds: float = 60.0
    vocab_size: int = 2
    rounds: int | None = None

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of sessions after which sampling may end, the last of which ends it."""
        return LOOKS if self.rounds is None else (self.rounds,)


@dataclass
class Samples:
    """The measurements.

    Attributes:
        series: Workload -> artifact -> its series.
        unstable: Number of warm-ups that did not reach a steady time.
    """

    series: dict[str, dict[str, Series]] = field(default_factory=dict)
    unstable: int = 0


Opener = Callable[[int], Mapping[str, Runner]]
"""Number of a session -> its runners by artifact, opened anew."""


def growth(context: int) -> int:
    """Tokens that decode steps may add to a context before the prompt is prefilled again."""
    return max(2 * (STEPS + 1), context // 4)


def timed(call: Callable[[], object]) -> Call:
    """Run a call and time it."""
    waits = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Call(wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw > waits)


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Pin this thread and those that it starts to the `threads` idlest CPUs, and yield these CPUs.

    If the system cannot pin threads, nothing is done, and an empty tuple is yielded.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    before = os.sched_getaffinity(0)
    psutil.cpu_percent(percpu=True)
    time.sleep(0.2)
    busy = psutil.cpu_percent(percpu=True)
    idlest = sorted(before, key=lambda cpu: busy[cpu] if cpu < len(busy) else 0.0)[:threads]
    os.sched_setaffinity(0, idlest)
    try:
        yield tuple(sorted(idlest))
    finally:
        os.sched_setaffinity(0, before)


def sample(opened: Opener, plan: Plan, told: Callable[[int, int], None] = lambda *_: None) -> Samples:
    """Measure prefill and decode of every context, session by session, until the demands are decided or time is up.

    Args:
        opened: Number of a session -> new runners by name, such as "candidate" and "baseline".
        plan: Settings.
        told: Called with the seconds spent and the seconds allowed.
    """
    samples = Samples()
    start = time.perf_counter()
    for session in range(1, plan.looks[-1] + 1):
        runners = opened(session)
        for context in plan.contexts:
            _Session(runners, plan, context, samples).run()
        spent = time.perf_counter() - start
        told(min(int(spent), int(plan.seconds)), int(plan.seconds))
        if spent > plan.seconds or (session in plan.looks and _decided(plan, samples)):
            break
    return samples


def _decided(plan: Plan, samples: Samples) -> bool:
    outcomes = (judge(demand, samples.series, plan.threads)[1] for demand in plan.demands)
    return all(outcome in (Decision.MET, Decision.MISSED) for outcome in outcomes)


@dataclass
class _Session:
    """One context length in one session."""

    runners: Mapping[str, Runner]
    plan: Plan
    context: int
    samples: Samples

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.context)
        # `opened` changes the order of the runners from session to session.
        self.order = list(self.runners)

    def run(self) -> None:
        """Warm up, prefill once, then take turns of decode steps until the context has grown or the time is up."""
        for name in self.runners:
            self._warm_up(name)
        prefill, decode = self._series("prefill"), self._series("decode")
        prompt = self._ids(self.context)
        for name in self.order:
            runner = self.runners[name]
            prefill[name].add([timed(partial(last_logits, runner, prompt, start=True))])
        start = time.perf_counter()
        for _ in range(growth(self.context) // (STEPS + 1)):
            self.order.reverse()
            tokens = [self._ids(1) for _ in range(STEPS + 1)]
            for name in self.order:
                runner = self.runners[name]
                turn = [timed(partial(runner.decode, ids)) for ids in tokens]
                decode[name].add(turn[1:])
            if time.perf_counter() - start > DECODE_SECONDS * len(self.order):
                return

    def _series(self, phase: str) -> dict[str, Series]:
        each = self.samples.series.setdefault(str(Workload(phase, self.context)), {})
        for name in self.runners:
            each.setdefault(name, Series()).begin()
        return each

    def _warm_up(self, name: str) -> None:
        """Call decode until the fastest calls of two successive windows take about the same time."""
        runner = self.runners[name]
        prompt, start = self._ids(self.context), time.perf_counter()
        runner.prefill(prompt)
        recent: list[float] = []
        while len(recent) < WARM_UPS and time.perf_counter() - start < WARM_UP_SECONDS:
            if recent and len(recent) % growth(self.context) == 0:
                runner.prefill(prompt)
            recent.append(timed(lambda: runner.decode(self._ids(1))).wall)
            if len(recent) >= 2 * STEPS:
                first, second = min(recent[-2 * STEPS : -STEPS]), min(recent[-STEPS:])
                if abs(first / second - 1) < STABLE:
                    return
        self.samples.unstable += 1

    def _ids(self, length: int) -> np.ndarray:
        return self.random.integers(0, self.plan.vocab_size, (1, length), dtype=np.int64)


def longest(runner: Runner, context_length: int | None) -> int | None:
    """The longest sequence in tokens that runner and model take; None if there is no limit."""
    limits = [limit for limit in (limits_of(runner).max_sequence, context_length) if limit is not None]
    return min(limits, default=None)
