"""Artifacts compared: a difference that was put in is found, one that was not is not, and other models are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moec import cli
from moec.compiler.common.artifact import write_manifest
from moec.compiler.common.errors import CheckpointError, UsageError
from moec.compiler.families.tiny_models import character_tokenizer
from moec.compiler.measure import compare
from moec.compiler.measure.compare import CompareOptions, Outcome, compare_artifacts
from moec.compiler.measure.latency.statistics import Interval
from moec.compiler.measure.latency.timings import Call, Series
from moec.compiler.report import comparison
from moec.targets.runners import RunnerLimits

VOCABULARY = 128


class Model:
    """Logits that favour the next token, with noise that depends on the artifact."""

    limits = RunnerLimits()

    def __init__(self, skill: float, seed: int) -> None:
        self.skill, self.seed = skill, seed

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        ids = input_ids[0]
        # Windows differ in how hard they are, in the same way for all artifacts.
        hard = np.random.default_rng(int(ids.sum())).normal(0, 1)
        noise = np.random.default_rng([self.seed, int(ids[0])]).normal(0, 0.2, (len(ids), VOCABULARY))
        logits = noise.astype(np.float32)
        logits[np.arange(len(ids) - 1), ids[1:]] += self.skill + hard
        return logits[None]


def fake_target(skills: Mapping[str, float], measured: str = "yes") -> Any:
    """A target whose artifacts have the skill that their directory's name stands for."""

    def open_reference(directory: Path, *, threads: int) -> Model:  # noqa: ARG001
        return Model(skills[directory.name], sum(map(ord, directory.name)))

    return SimpleNamespace(name="fake", open_reference=open_reference, doctor=lambda: {"measure": measured})


def artifact(directory: Path, *, vocabulary: int = VOCABULARY, size: int = 1000, source: str = "x") -> Path:
    directory.mkdir()
    (directory / "model.bin").write_bytes(b"x" * size)
    character_tokenizer(vocabulary).save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"vocab_size": vocabulary, "max_position_embeddings": 32}))
    model = {"vocab_size": vocabulary}
    write_manifest(directory, {"recipe": {"target": "fake"}, "model": model, "source": {"digests": {"w": source}}})
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number * number} is the square of {number}.\n" for number in range(300)))
    return path


def timed(factors: Mapping[str, float], sessions: int = 12) -> Callable[..., dict[str, Any]]:
    """A stand-in for the measuring process: artifact -> time of its calls."""

    def series(name: str, workload: str) -> dict[str, Any]:
        random, found = np.random.default_rng([ord(name), len(workload)]), Series()
        for _ in range(sessions):
            found.begin()
            for seconds in 0.01 * factors[name] * np.exp(0.02 * random.standard_normal((3, 4))):
                found.add([Call(value, value, False) for value in seconds])
        return asdict(found)

    def measure(job: Mapping[str, Any], told: Callable[[int, int], None]) -> dict[str, Any]:
        told(1, 2)
        if job["kind"] == "cold":
            return {"load": 0.5, "first_token": 0.8, "peak_rss": 2e8}
        assert job["rounds"] == sessions
        names = [f"{phase}{context}" for context in job["contexts"] for phase in ("prefill", "decode")]
        return {"series": {name: {one: series(one, name) for one in job["artifacts"]} for name in names}}

    return measure


def silent(*_: Any) -> None:
    """Shows nothing."""


def test_better_worse_and_the_same_are_told_apart(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skills = {"base": 2.0, "worse": 1.9, "again": 2.0}
    monkeypatch.setattr(compare, "get_target", lambda _: fake_target(skills))
    places = [artifact(tmp_path / name, size=500 if name == "worse" else 1000) for name in skills]
    options = CompareOptions(str(text), windows=40, rounds=12)
    found = compare_artifacts(places, options, silent, timed({"A": 1.0, "B": 0.7, "C": 1.0}))
    assert found.text["windows"] == 40
    assert found.text["length"] == 32  # that of the model's context
    worse, same = found.verdicts
    # The true increase is that of a loss that grows by less than the skill falls.
    assert 0 < worse.increase.low < worse.increase.value < math.expm1(0.1)
    assert worse.times["decode128"].value == pytest.approx(0.7, rel=0.03)
    assert worse.outcome is Outcome.MIXED
    assert worse.sentence.startswith("B is better than A in some respects and worse in others: its perplexity is ")
    assert "] higher; prefill128 is 1.4" in worse.sentence
    assert "its files are" in worse.sentence
    assert same.outcome is Outcome.SAME
    assert same.sentence.startswith("C cannot be told apart from A: perplexity cannot be told apart (")
    assert same.agreement < 1
    assert found.figures[1].perplexity / found.figures[0].perplexity - 1 == pytest.approx(worse.increase.value)
    shown = comparison.markdown(found)
    assert "| decode128, time relative to A |  | 0.69" in shown
    assert json.loads(json.dumps(found.record()))["verdicts"][0]["outcome"] == "better and worse"


def test_few_rounds_tell_nothing_apart_and_another_source_is_named(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "get_target", lambda _: fake_target({"a": 2.0, "b": 2.2}))
    places = [artifact(tmp_path / "a"), artifact(tmp_path / "b", source="y")]
    found = compare_artifacts(places, CompareOptions(str(text), rounds=3), silent, timed({"A": 1, "B": 0.5}, 3))
    (verdict,) = found.verdicts
    assert verdict.outcome is Outcome.BETTER
    assert "] lower; prefill128 was measured in too few rounds" in verdict.sentence
    assert verdict.sentence.endswith("it was built from another checkpoint.")
    # JSON has no infinity.
    assert "Infinity" not in json.dumps(found.record())


def test_what_cannot_be_measured_is_said(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = fake_target({"a": 2.0, "b": 2.0}, measured="no: there is no device here")
    monkeypatch.setattr(compare, "get_target", lambda _: target)
    found = compare_artifacts([artifact(tmp_path / "a"), artifact(tmp_path / "b")], CompareOptions(str(text)), silent)
    assert found.not_measured == "A: there is no device here"
    assert found.figures[0].memory is None
    assert "Latency was not measured: A: there is no device here." in comparison.markdown(found)


@pytest.mark.parametrize(
    ("each", "outcome"),
    [
        ([Outcome.SAME, Outcome.SAME], Outcome.SAME),
        ([Outcome.SAME, Outcome.WORSE], Outcome.WORSE),
        ([Outcome.BETTER, Outcome.BETTER], Outcome.BETTER),
        ([Outcome.BETTER, Outcome.SAME, Outcome.WORSE], Outcome.MIXED),
    ],
)
def test_respects_amount_to_one_outcome(each: list[Outcome], outcome: Outcome) -> None:
    assert Outcome.all(each) is outcome


def test_an_interval_that_touches_nothing_tells_nothing_apart() -> None:
    assert Outcome.of(Interval(0.01, 0.0, 0.02), 0.0) is Outcome.SAME
    assert Outcome.of(Interval(1.0, 0.0, math.inf), 1.0) is Outcome.SAME
    assert Outcome.of(Interval(0.9, 0.8, 0.99), 1.0) is Outcome.BETTER


def test_other_models_and_short_texts_are_refused(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "get_target", lambda _: fake_target({"a": 2.0, "b": 2.0}))
    first, options = artifact(tmp_path / "a"), CompareOptions(str(text))
    with pytest.raises(UsageError, match="their vocabularies have 128 and 160 entries") as error:
        compare_artifacts([first, artifact(tmp_path / "c", vocabulary=160)], options, silent)
    assert "of one model" in error.value.hint
    other = artifact(tmp_path / "b")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps({**tokenizer, "version": "1.0", "extra": 1}))
    with pytest.raises(UsageError, match="their tokenizers differ"):
        compare_artifacts([first, other], options, silent)
    text.write_text("short. " * 12)
    with pytest.raises(CheckpointError, match="the text has 2 windows of 32 tokens, too few") as short:
        compare_artifacts([first, first], options, silent)
    assert "--window" in short.value.hint


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["A"], 2, "1 artifacts are given, and 2 to 4 can be compared"),
        (["A", "nowhere"], 9, "nowhere: not an artifact"),
        (["A", "A", "--text", "nowhere.txt"], 10, "nowhere.txt: cannot be read"),
        (["A", "A", "--rounds", "0"], 2, "--rounds"),
    ],
)
def test_what_makes_no_sense_is_said(
    golden_onnx: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    given = [str(golden_onnx) if word == "A" else word for word in arguments]
    assert cli.dispatch(["compare", *given, "-q"]) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_artifact_cannot_be_told_apart_from_itself(golden_onnx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(golden_onnx)
    command = ["compare", place, place, "--windows", "8", "--window", "32", "--no-latency", "--exit-code", "-q"]
    assert cli.dispatch([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["verdicts"][0]["outcome"] == "cannot be told apart"
    assert (found["verdicts"][0]["agreement"], found["verdicts"][0]["divergence"]) == (1.0, 0.0)
    assert cli.dispatch(command) == 0
    assert "latency was not measured: switched off" in capsys.readouterr().out
