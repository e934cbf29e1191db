"""The golden model as an ONNX artifact against what transformers alone recorded of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moec.compiler.api import export
from moec.compiler.text.corpus import tokenize, windows
from moec.compiler.text.perplexity import losses, perplexity
from moec.targets import get_target
from moec.targets.runners import Runner

WORST = 1e-4


@pytest.fixture(scope="module")
def artifact(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("golden") / "out"
    export(golden_model, target="onnx", output=directory, gates=False)
    return directory


@pytest.fixture(scope="module")
def runner(artifact: Path) -> Iterator[Runner]:
    return get_target("onnx").open(artifact, threads=1)


@pytest.fixture(scope="module")
def recorded(golden_model: Path) -> dict[str, np.ndarray]:
    with np.load(golden_model / "golden_logits.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("prompt", range(4))
def test_logits_are_the_recorded_ones(runner: Runner, recorded: dict[str, np.ndarray], prompt: int) -> None:
    ids, want = recorded[f"{prompt}.input_ids"], recorded[f"{prompt}.logits"]
    found = runner.prefill(ids[None])[0, -len(want) :]
    assert np.abs(found - want).max() <= WORST * np.abs(want).max()


@pytest.mark.parametrize("prompt", range(4))
def test_64_greedy_tokens_are_the_recorded_ones(runner: Runner, recorded: dict[str, np.ndarray], prompt: int) -> None:
    want = recorded[f"{prompt}.greedy"]
    logits = runner.prefill(recorded[f"{prompt}.input_ids"][None])
    found = [int(logits[0, -1].argmax())]
    while len(found) < len(want):
        found.append(int(runner.decode(np.array([[found[-1]]]))[0, -1].argmax()))
    assert found == want.tolist()


@pytest.mark.parametrize("text", ["heldout_kjv.txt", "heldout_python.txt"])
def test_perplexity_is_that_of_transformers_to_four_digits(runner: Runner, golden_model: Path, text: str) -> None:
    record = json.loads((golden_model / "perplexities.json").read_text())
    ids = tokenize(golden_model, (golden_model / "texts" / text).read_text(encoding="utf-8"))
    found = perplexity(losses(runner, windows(ids, record["window"], record["windows"])))
    assert f"{found:.4g}" == f"{record['perplexity'][text]:.4g}"


def test_a_second_export_is_byte_identical(artifact: Path, golden_model: Path, tmp_path: Path) -> None:
    export(golden_model, target="onnx", output=tmp_path / "again", gates=False)
    for name in ("moec.json", "model.onnx", "model.onnx_data"):
        assert (tmp_path / "again" / name).read_bytes() == (artifact / name).read_bytes(), name
