"""`moec drift` on artifacts of the golden model, with little text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec import cli
from moec.compiler.common.artifact import read_manifest, write_manifest
from moec.compiler.common.errors import ArtifactError
from moec.compiler.measure.expert_use import FILE
from moec.compiler.pipeline import calibration_data, drift
from moec.compiler.pipeline.drift import find_drift
from moec.compiler.pipeline.export import compile_recipe
from moec.compiler.pipeline.recipe import make_recipe

TEXTS = Path(__file__).resolve().parents[3] / "golden_models" / "olmoe-tiny" / "texts"


@pytest.fixture(scope="module", autouse=True)
def little_text() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LENGTH": 64, "WINDOWS": 16, "SENSITIVITY_WINDOWS": 1}.items():
            patch.setattr(calibration_data, name, value)
        patch.setattr(drift, "LENGTH", 64)
        yield


@pytest.fixture(scope="module")
def out(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with dynamic routing that returns the experts of each token."""
    directory = tmp_path_factory.mktemp("drift") / "out"
    section = {"policy": "top-p", "budget": 0.6, "prune": 0.125}
    fields = {"checkpoint": str(golden_model), "target": "onnx", "options": {"routing_outputs": True}}
    compile_recipe(make_recipe({**fields, "routing": section}), directory, gates=False)
    return directory


def test_an_export_records_what_it_accounts_for(out: Path) -> None:
    manifest = read_manifest(out)
    content = json.loads((out / FILE).read_text())
    assert FILE in manifest["files"]
    accounted = manifest["routing"]["accounting"]["layers"]
    assert [[sum(column) for column in zip(*layer["tokens"], strict=True)] for layer in content["layers"]] == [
        layer["tokens"] for layer in accounted
    ]
    assert [layer["top_k"] for layer in content["layers"]] == [layer["top_k"] for layer in accounted]
    assert content["text"] == {**manifest["routing"]["calibration"]["text"], "windows": 16}


def test_the_artifact_itself_shows_a_drift(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["drift", str(out), "--windows", "16", "-q", "--text"]
    assert cli.dispatch([*command, str(TEXTS / "heldout_kjv.txt")]) == 7
    shown = capsys.readouterr().out
    assert shown.startswith("Drift in ")
    assert "by chance" in shown
    assert cli.dispatch([*command, str(TEXTS / "calibration.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert (found["drifted"], found["measured_by"], found["budget"]) == ([], "artifact", None)
    assert found["windows"] == {"calibration": 16, "new": 16, "length": 64}
    assert found["kept"] == pytest.approx(found["kept_before"], abs=0.02)
    assert found["sentence"].startswith("No drift: ")


def test_the_checkpoint_shows_the_same_and_what_calibration_would_choose(
    out: Path, golden_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = find_drift(out, str(TEXTS / "calibration.txt"), against=str(golden_model), count=16)
    (artifact, checkpoint) = (find_drift(out, str(TEXTS / "calibration.txt"), count=16), same)
    assert checkpoint.measured_by == "checkpoint"
    # The artifact and the interpreter may route a token differently where two experts are nearly equally likely.
    for one, other in zip(artifact.layers, checkpoint.layers, strict=True):
        assert one.distance == pytest.approx(other.distance, abs=2e-3)
    assert same.budget is not None
    assert same.budget.parameters == same.budget.parameters_before
    assert (same.budget.before, same.budget.policy) == (same.budget.now, "top-p")
    command = ["drift", str(out), "--against", str(golden_model), "--windows", "16", "-q"]
    assert cli.dispatch([*command, "--text", str(TEXTS / "heldout_kjv.txt")]) == 7
    assert "if it were calibrated on this text: " in capsys.readouterr().out


def test_without_a_record_the_text_of_calibration_is_run_too(golden_onnx: Path, golden_model: Path) -> None:
    text = str(TEXTS / "calibration.txt")
    found = find_drift(golden_onnx, text, against=str(golden_model), count=16)
    assert (found.drifted, found.kept, found.budget) == ((), 1.0, None)
    other = find_drift(golden_onnx, text, against=str(golden_model), calibration=str(TEXTS / "heldout_kjv.txt"))
    assert len(other.drifted) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        ("STATIC --text TEXT", 2, "does not return which experts it uses", "--routing-outputs"),
        ("OUT --text nowhere.txt", 10, "nowhere.txt: cannot be read", "give a text file"),
        ("OUT --text SHORT", 10, "the new text has 1 windows of 64 tokens", "at least 256 tokens"),
        ("OUT --text TEXT --windows 2", 2, "--windows", ""),
        ("nowhere --text TEXT", 9, "nowhere: not an artifact", ""),
        ("OUT --text TEXT --against OTHER", 10, "not the checkpoint that the artifact was built from", "exported from"),
    ],
)
def test_what_cannot_be_done_is_said(
    out: Path,
    golden_onnx: Path,
    tiny_checkpoint: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    message: str,
    hint: str,
) -> None:
    (tmp_path / "short.txt").write_text("one two three four " * 24)
    places = {
        "OUT": out,
        "STATIC": golden_onnx,
        "TEXT": TEXTS / "calibration.txt",
        "SHORT": tmp_path / "short.txt",
        "OTHER": tiny_checkpoint("olmoe"),
    }
    assert cli.dispatch(["drift", *(str(places.get(word, word)) for word in arguments.split()), "-q"]) == code
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert hint in said


def test_a_record_of_another_model_is_refused(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = json.loads((copy / FILE).read_text())
    content["layers"].pop()
    (copy / FILE).write_text(json.dumps(content))
    manifest = read_manifest(out)
    write_manifest(copy, {key: value for key, value in manifest.items() if key not in ("files", "digest")})
    with pytest.raises(ArtifactError, match=r"expert_use\.json is of another model"):
        find_drift(copy, str(TEXTS / "calibration.txt"))
