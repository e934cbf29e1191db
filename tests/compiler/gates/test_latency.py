"""The latency gate: what it demands, what it says, and that it never passes what was not measured."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moec.compiler.common import artifact
from moec.compiler.common.errors import UsageError
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.gates.latency import EXIT_CODE, judge_latency, make_options, not_run
from moec.compiler.gates.run import exit_code
from moec.compiler.measure.latency.timings import Call, Series

HERE = Path(__file__).parent
CAN: Any = SimpleNamespace(doctor=lambda: {"measure": "yes"})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "model.bin").write_bytes(b"x" * 1000)
    content = {"recipe": {"target": "fake"}, "model": {"vocab_size": 8}, "model_files": ["model.bin"]}
    artifact.write_manifest(directory, content)
    return directory


def series(factor: float, spread: float, seed: int) -> dict[str, Any]:
    random, found = np.random.default_rng(seed), Series()
    for _ in range(20):
        found.begin()
        for seconds in 0.01 * factor * np.exp(spread * random.standard_normal((2, 4))):
            found.add([Call(value, value, False) for value in seconds])
    return asdict(found)


def measuring(slow_down: float = 1.0, spread: float = 0.02) -> Callable[..., dict[str, Any]]:
    """A stand-in for the measuring process."""

    def measure(job: Mapping[str, Any], told: Callable[[int, int], None]) -> dict[str, Any]:
        told(1, 2)
        if job["kind"] == "cold":
            return {"load": 0.5, "first_token": 0.8, "peak_rss": 2e8}
        factors = {"candidate": slow_down, "baseline": 1.0}
        names = [f"{phase}{context}" for context in job["contexts"] for phase in ("decode", "prefill")]
        found = {
            name: {one: series(factors[one], spread, 2 * seed + len(one)) for one in job["artifacts"]}
            for seed, name in enumerate(names)
        }
        facts = {"unstable": 0, "left_out": [], "cpus": [0], "load_average": 0.5, "runners": {}}
        return {"series": found, **facts}

    return measure


def judge(out: Path, measure: Callable[..., dict[str, Any]], *, target: Any = CAN, **given: Any) -> Verdict:
    section = {"budget": None, "baseline": None, "max_regression": 0.05, "threads": 1, "contexts": (64,), "seconds": 9}
    options = make_options(**{**section, **given})
    assert options is not None
    return judge_latency(target, out, options, lambda *_: None, measure)


def test_an_identical_artifact_passes(out: Path) -> None:
    verdict = judge(out, measuring(), baseline=str(out))
    assert verdict.status is Status.PASS
    assert set(verdict.figures["ratios"]) == {"decode64", "prefill64"}
    assert verdict.figures["pinned_to_cpus"] == [0]
    json.dumps(verdict.figures)


def test_a_slower_one_fails_with_the_exit_code_of_latency(out: Path) -> None:
    verdict = judge(out, measuring(1.15), baseline=str(out / "moec.json"))
    assert verdict.status is Status.FAIL
    assert exit_code([verdict]) == EXIT_CODE == 6
    assert verdict.summary.startswith("slower: ")
    assert verdict.figures["ratios"]["decode64"]["interval"]["value"] == pytest.approx(1.15, abs=0.03)


def test_a_noisy_machine_is_a_verdict_of_its_own_and_no_pass(out: Path) -> None:
    verdict = judge(out, measuring(spread=0.8), baseline=str(out))
    assert verdict.status is Status.NOISY
    assert verdict.summary.startswith("machine too noisy: ratio interval ±")
    assert exit_code([verdict]) == 6


def test_every_kind_of_budget_is_judged(out: Path) -> None:
    budget = "decode64.p50=12ms,prefill64.p90=20ms,load=1s,first_token=1s,peak_rss=300MB,size=1kB"
    verdict = judge(out, measuring(), budget=budget)
    assert verdict.status is Status.PASS
    assert len(verdict.figures["demands"]) == 6
    for over in ("decode64.p50=9ms", "load=400ms", "first_token=1ms", "peak_rss=1MB", "size=999B"):
        verdict = judge(out, measuring(), budget=over)
        assert verdict.status is Status.FAIL, over
        assert verdict.summary.startswith(f"over budget: {over.partition('=')[0]} ")


def test_too_few_calls_prove_nothing(out: Path) -> None:
    verdict = judge(out, measuring(), budget="decode64.p99=1s")
    assert verdict.status is Status.FAIL
    assert "needs 368" in verdict.summary


def test_a_budget_is_measured_at_its_context(out: Path) -> None:
    assert "decode32" in judge(out, measuring(), budget="decode32.p50=1s").figures["workloads"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("no: needs macOS", "not measured: needs macOS"), ("no", "not measured: this machine cannot")],
)
def test_a_target_that_cannot_measure_here_did_not_pass(out: Path, answer: str, reason: str) -> None:
    target = SimpleNamespace(doctor=lambda: {"measure": answer})
    verdict = judge(out, measuring(), target=target, budget="decode.p50=1s")
    assert verdict.status is Status.NOT_RUN
    assert verdict.summary == reason


def test_where_nothing_is_demanded_it_does_not_run_and_says_so() -> None:
    assert make_options(None, None, 0.05, 1, (128,), 60) is None
    assert not_run().status is Status.NOT_RUN
    assert "--latency-budget" in not_run().summary


def test_a_baseline_must_be_an_artifact_that_can_be_run(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an artifact"):
        judge(out, measuring(), baseline=str(tmp_path / "nothing"))
    (out / "model.bin").unlink()
    with pytest.raises(UsageError, match=r"model\.bin missing"):
        judge(out, measuring(), baseline=str(out))


def replaying(run: Mapping[str, Any], unit: float) -> Callable[..., dict[str, Any]]:
    """The measuring process with what it once measured."""

    def turns(sessions: list[list[int]]) -> list[list[list[float]]]:
        return [[[median * unit] for median in session] for session in sessions]

    def measure(job: Mapping[str, Any], _: object) -> dict[str, Any]:
        if job["kind"] == "cold":
            return {"load": 0.5, "first_token": 0.8, "peak_rss": 2e8}
        found = {
            workload: {
                one: {"wall": turns(clocks["wall"]), "cpu": turns(clocks["cpu"]), "waits": 0}
                for one, clocks in by_artifact.items()
            }
            for workload, by_artifact in run["series"].items()
        }
        return {"series": found, "unstable": 0, "left_out": [], "cpus": [0], "load_average": 2.0, "runners": {}}

    return measure


def test_recorded_runs_beside_a_load_are_told_apart(out: Path) -> None:
    """Runs of benchmarks/latency_power.py: an artifact with 15 % of extra work, and the baseline itself."""
    recorded = json.loads((HERE / "recorded_latency.json").read_text())
    codes: dict[str, list[int]] = {"planted": [], "identical": []}
    for run in recorded["runs"]:
        verdict = judge(out, replaying(run, recorded["unit"]), baseline=str(out), contexts=(128,))
        codes[run["name"]].append(exit_code([verdict]))
    assert [len(each) for each in codes.values()] == [20, 20]
    assert codes["planted"].count(6) >= 19
    assert codes["identical"].count(0) >= 18
