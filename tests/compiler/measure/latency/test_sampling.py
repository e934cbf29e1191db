"""Sampling in turns, with runners whose times are known."""

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from moec.compiler.measure.latency.demands import regressions
from moec.compiler.measure.latency.sampling import LOOKS, Plan, growth, longest, pinned, sample
from moec.compiler.measure.latency.timings import Clock, Decision, judge, ratio
from moec.targets.runners import RunnerLimits


class Spinning:
    """A runner whose calls take a known time on the core; `log` notes each."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log, self.length = name, seconds, log, 0
        self.limits = RunnerLimits()

    def reset(self) -> None: ...

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        self.length = 0
        return self.decode(input_ids)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        self.length += input_ids.shape[1]
        self.log.append(self.name)
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        return np.zeros((1, input_ids.shape[1], 2), np.float32)

    def facts(self) -> Mapping[str, Any]:
        return {}


def measure(plan: Plan, slow_down: float = 1.0) -> tuple[Any, list[str], list[Spinning]]:
    log: list[str] = []
    opened: list[Spinning] = []

    def anew(session: int) -> dict[str, Spinning]:
        del session
        pair = {"candidate": Spinning("c", 0.0002 * slow_down, log), "baseline": Spinning("b", 0.0002, log)}
        opened.extend(pair.values())
        return pair

    return sample(anew, plan), log, opened


def test_a_slow_down_is_found_and_sampling_ends_when_it_is() -> None:
    demands = regressions((16,), 0.05)
    found, log, opened = measure(Plan((16,), demands, seconds=30), slow_down=1.5)
    sessions = len(opened) // 2
    assert sessions in LOOKS
    assert {judge(demand, found.series, 1)[1] for demand in demands} == {Decision.MISSED}
    assert found.series["decode16"]["candidate"].calls(Clock.CPU)
    assert max(runner.length for runner in opened) <= 16 + growth(16)
    # The artifacts take turns of five steps, of which the first is not counted.
    turns = "".join(log[-20:])
    assert turns in ("cccccbbbbbbbbbbccccc", "bbbbbccccccccccbbbbb")
    assert {len(turn) for session in found.series["decode16"]["candidate"].wall for turn in session} == {4}


def test_it_ends_when_time_is_up() -> None:
    start = time.perf_counter()
    found, _, opened = measure(Plan((16, 32), regressions((16, 32), 1e-6), seconds=0.3))
    assert time.perf_counter() - start < 10
    assert set(found.series) == {"prefill16", "decode16", "prefill32", "decode32"}
    assert len(opened) // 2 == len(found.series["prefill32"]["baseline"].wall)


def test_threads_are_pinned_and_set_free_again() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1) as cpus:
        assert os.sched_getaffinity(0) == set(cpus)
        assert len(cpus) == 1
    assert os.sched_getaffinity(0) == before


def test_the_longest_sequence_is_what_model_and_runner_take() -> None:
    runner = Spinning("c", 0, [])
    assert longest(runner, None) is None
    assert longest(runner, 64) == 64
    runner.limits = RunnerLimits(max_sequence=48)
    assert longest(runner, 64) == 48


def test_three_runners_take_their_turns_for_as_many_sessions_as_are_asked_for() -> None:
    log: list[str] = []
    sessions: list[int] = []

    def anew(session: int) -> dict[str, Spinning]:
        sessions.append(session)
        return {name: Spinning(name, 0.0001, log) for name in "ABC"}

    found = sample(anew, Plan((16,), seconds=30, rounds=3))
    assert sessions == [1, 2, 3]
    assert [len(found.series["decode16"][name].sessions(Clock.WALL)) for name in "ABC"] == [3, 3, 3]
    assert ratio(found.series["decode16"], 1, of="C", to="A").sessions == 3
