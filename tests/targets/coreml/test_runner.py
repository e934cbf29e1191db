"""The runner over a backend that records its calls, the two backends, and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from moec import cli
from moec.compiler.common.errors import ArtifactError, UsageError
from moec.targets.coreml import predict
from moec.targets.coreml.metadata import METADATA_KEY, ModelMetadata, read_metadata
from moec.targets.coreml.package import PACKAGE
from moec.targets.coreml.predict import CoreMLBackend, ExecutorBackend, open_backend
from moec.targets.coreml.runner import CoremlRunner

VOCABULARY = 7


class Recorder:
    """A backend that answers with the token ids as logits."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.calls: list[tuple[str, list[int], list[int]]] = []
        self.extra: list[Mapping[str, Any]] = []
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def predict(self, function: str, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        ids, position = feeds["input_ids"], feeds["cache_position"]
        assert ids.dtype == position.dtype == np.int32
        self.calls.append((function, ids[0].tolist(), position.tolist()))
        self.extra.append({key: value for key, value in feeds.items() if key not in ("input_ids", "cache_position")})
        return {"logits": np.repeat(ids[..., None], VOCABULARY, -1).astype(np.float16)}

    def facts(self) -> Mapping[str, Any]:
        return {"runtime": "recorder"}


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CoremlRunner, Recorder]:
    metadata = ModelMetadata(context=10, chunk=4, experts={}, inputs={"routing_budget": [0.5]})
    monkeypatch.setattr("moec.targets.coreml.runner.read_metadata", lambda _: metadata)
    recorder = Recorder(tmp_path / PACKAGE)
    return CoremlRunner(tmp_path, backend=lambda _: recorder), recorder


def test_prompts_go_in_pieces_and_single_tokens_to_decode(recorded: tuple[CoremlRunner, Recorder]) -> None:
    runner, recorder = recorded
    logits = runner.prefill(np.arange(5)[None])
    assert logits.dtype == np.float32
    assert logits.shape == (1, 5, VOCABULARY)
    assert logits[0, :, 0].tolist() == [0, 1, 2, 3, 4]
    runner.decode(np.array([[5, 6]]))
    runner.decode(np.array([[7]]), np.ones((1, 8), np.int64))
    assert recorder.calls == [
        ("prefill", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("decode", [4], [4]),
        ("prefill", [5, 6], [5, 6]),
        ("decode", [7], [7]),
    ]
    assert all(extra["routing_budget"].tolist() == [0.5] for extra in recorder.extra)
    runner.prefill(np.array([[1]]))
    assert recorder.calls[-1] == ("decode", [1], [0])
    assert recorder.resets == 2


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((2, 1), int), None, "2 sequences at once: the CoreML target runs at most 1"),
        (np.zeros((1, 2), int), np.array([[0, 1]]), "does not support padding"),
        (np.zeros((1, 11), int), None, "11 tokens exceed the 10"),
    ],
)
def test_what_the_runner_does_not_take(
    recorded: tuple[CoremlRunner, Recorder], ids: np.ndarray, mask: np.ndarray | None, message: str
) -> None:
    runner, recorder = recorded
    with pytest.raises(UsageError, match=message):
        runner.prefill(ids, mask)
    assert not recorder.calls


def test_limits_and_facts(recorded: tuple[CoremlRunner, Recorder]) -> None:
    runner, _ = recorded
    limits = runner.limits
    assert (limits.max_batch, limits.padding, limits.max_sequence) == (1, False, 10)
    assert runner.facts() == {"runtime": "recorder", "context": 10, "prefill_chunk": 4}


class FakeModel:
    """`coremltools.models.MLModel` as it is on macOS."""

    made: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, path: str, *, function_name: str, compute_units: str) -> None:
        assert path
        self.function = function_name
        self.made.append((function_name, compute_units))

    def make_state(self) -> dict[str, int]:
        return {"tokens": 0}

    def predict(self, feeds: Mapping[str, Any], *, state: dict[str, int]) -> Mapping[str, np.ndarray]:
        if self.function == "broken":
            raise RuntimeError("error in plan\nmore")
        state["tokens"] += feeds["input_ids"].shape[1]
        return {"logits": np.array([state["tokens"]])}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeTools:
        class models:  # noqa: N801
            MLModel = FakeModel

        class ComputeUnit:
            ALL = "all units"

    FakeModel.made = []
    monkeypatch.setattr(predict, "coremltools_module", lambda: FakeTools)
    monkeypatch.setattr(predict.sys, "platform", "darwin")


@pytest.mark.usefixtures("mac")
def test_core_ml_shares_one_state_between_the_functions(tmp_path: Path) -> None:
    backend = open_backend(tmp_path)
    assert isinstance(backend, CoreMLBackend)
    ids = {"input_ids": np.zeros((1, 3), np.int32)}
    assert backend.predict("prefill", ids)["logits"] == 3
    assert backend.predict("decode", {"input_ids": ids["input_ids"][:, :1]})["logits"] == 4
    assert backend.predict("prefill", ids)["logits"] == 7
    assert FakeModel.made == [("prefill", "all units"), ("decode", "all units")]
    backend.reset()
    assert backend.predict("prefill", ids)["logits"] == 3
    assert backend.facts()["compute_units"] == "ALL"


@pytest.mark.usefixtures("mac")
def test_core_ml_refusals_name_the_function(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot run function broken: error in plan$"):
        CoreMLBackend(tmp_path).predict("broken", {"input_ids": np.zeros((1, 1))})


def test_other_systems_use_the_executor(
    tiny_checkpoint: Any, program_of: Any, lower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict.sys, "platform", "linux")
    lowered = lower(program_of(tiny_checkpoint("olmoe"), torch.float16), context=16, prefill_chunk=4)
    backend = open_backend(lowered.directory / PACKAGE)
    assert isinstance(backend, ExecutorBackend)
    runner = lowered.runner()
    first = runner.prefill(np.array([[5, 6, 7]]))
    np.testing.assert_array_equal(runner.prefill(np.array([[5, 6, 7]])), first)
    facts = runner.facts()
    assert facts["latency"] == "not measured: needs macOS"
    assert facts["executed"]["prefill"]["tokens"] == 6
    assert 0 < facts["executed"]["prefill"]["expert_macs"] < facts["executed"]["prefill"]["macs"]


def test_a_model_of_another_tool_is_refused(
    tiny_checkpoint: Any, program_of: Any, lower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = lower(program_of(tiny_checkpoint("olmoe"), torch.float16), context=16)
    assert read_metadata(lowered.directory).context == 16
    monkeypatch.setattr("moec.targets.coreml.metadata.METADATA_KEY", METADATA_KEY + "?")
    with pytest.raises(ArtifactError, match="moec did not write this model"):
        CoremlRunner(lowered.directory)
    with pytest.raises(ArtifactError, match=r"Manifest\.json cannot be read"):
        CoremlRunner(lowered.directory / "elsewhere")


def test_export_and_run_from_the_command_line(
    golden_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--context", "64", "--prefill-chunk", "16", "--no-gates", "-q"]
    assert cli.dispatch(["export", str(golden_model), "-t", "coreml", "-o", str(out), *flags]) == 0
    manifest = json.loads((out / "moec.json").read_text())
    assert {Path(name).name for name in manifest["model_files"]} == {"Manifest.json", "model.mlmodel", "weight.bin"}
    assert manifest["signature"]["prefill"]["inputs"][0]["range"] == [[1, 1], [1, 16]]
    assert manifest["facts"]["context"] == 64
    assert manifest["recipe"]["dtype"] == "fp16"
    assert cli.dispatch(["verify", str(out)]) == 0
    capsys.readouterr()
    assert cli.dispatch(["run", str(out), "-p", "In the beginning", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
    assert (
        cli.dispatch(["export", str(golden_model), "-t", "coreml", "-o", str(tmp_path / "x"), "--minimum", "ios17"])
        == 2
    )
    assert "neither states" in capsys.readouterr().err
