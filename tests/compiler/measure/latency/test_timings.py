"""What samples say of a demand: which clock counts, and when nothing is proven."""

import math

import numpy as np
import pytest

from moec.compiler.measure.latency.demands import Demand, Workload
from moec.compiler.measure.latency.statistics import Interval
from moec.compiler.measure.latency.timings import Call, Decision, Series, decide, judge, ratio


def series(factor: float = 1.0, *, load: float = 0.0, waited: bool = False, seed: int = 0) -> Series:
    """CPU times around 10 ms times `factor`; of the wall time others have the core for the share `load`."""
    random = np.random.default_rng(seed)
    found = Series()
    for _ in range(14):
        found.begin()
        for _ in range(3):
            cpu = 0.01 * factor * np.exp(0.02 * random.standard_normal(4))
            stolen = random.exponential(load / (1 - load), 4) if load else np.zeros(4)
            found.add([Call(own * (1 + other), own, waited) for own, other in zip(cpu, stolen, strict=True)])
    return found


def test_on_an_idle_machine_the_wall_clock_counts() -> None:
    found = ratio({"candidate": series(1.15), "baseline": series(seed=1)}, threads=1)
    assert found.clock == "wall"
    assert found.sessions == 14
    assert found.interval.low == pytest.approx(1.14, abs=0.02)


def test_on_a_busy_machine_the_time_on_the_core_counts() -> None:
    pair = {"candidate": series(1.15, load=0.5), "baseline": series(load=0.5, seed=1)}
    assert pair["candidate"].without_core() == pytest.approx(0.5, abs=0.15)
    found = ratio(pair, threads=1)
    assert found.clock == "cpu"
    assert found.interval.value == pytest.approx(1.15, abs=0.02)
    assert ratio(pair, threads=2).clock == "wall"


def test_a_call_that_waits_for_a_device_is_not_judged_by_its_time_on_the_core() -> None:
    pair = {"candidate": series(load=0.5, waited=True), "baseline": series(load=0.5, waited=True)}
    assert ratio(pair, threads=1).clock == "wall"


@pytest.mark.parametrize(
    ("interval", "decision"),
    [
        (Interval(1.0, 0.98, 1.04), Decision.MET),
        (Interval(1.15, 1.1, 1.2), Decision.MISSED),
        (Interval(1.05, 1.04, 1.06), Decision.AT_LIMIT),
        (Interval(1.02, 0.9, 1.3), Decision.NOISY),
        (Interval(1.0, 0.0, math.inf), Decision.TOO_FEW),
        (Interval(1.3, 1.2, math.inf), Decision.MISSED),
    ],
)
def test_only_a_whole_interval_within_the_limit_is_met(interval: Interval, decision: Decision) -> None:
    assert decide(interval, 1.05) is decision


def test_a_budget_is_judged_by_the_wall_clock() -> None:
    measured = {"decode128": {"candidate": series(load=0.5)}}
    workload = Workload("decode", 128)
    assert judge(Demand("decode.p50", workload, "p50", 0.010), measured, 1)[1] is Decision.MISSED
    assert judge(Demand("decode.p50", workload, "p50", 0.100), measured, 1)[1] is Decision.MET
    # 168 calls: none of them can tell what one in a hundred takes.
    assert judge(Demand("decode.p99", workload, "p99", 0.100), measured, 1)[1] is Decision.TOO_FEW
