"""`moec search`: what is asked for wrongly is said before anything is written, with a hint and an exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from moec.cli import dispatch
from moec.compiler.commands.search import parse_time
from moec.compiler.common.errors import UsageError
from moec.compiler.search.objectives import OBJECTIVES, parse_limit, parse_objectives, shown


def run(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> tuple[int, str]:
    code = dispatch(["search", *arguments])
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        ([], 2, "no target is given", "give --target NAME"),
        (["-t", "onnx", "--objectives", "perplexity,sise"], 2, "unknown objective 'sise'", "did you mean 'size'?"),
        (["-t", "onnx", "--objectives", "perplexity"], 2, "1 objectives", "perplexity,expert-flops,size"),
        (["-t", "onnx", "--objectives", "size,expert-flops"], 2, "the worst model would win", "add perplexity"),
        (["-t", "onnx", "--objectives", "perplexity,divergence"], 2, "measures a cost", "add expert-flops"),
        (["-t", "onnx", "--objectives", "perplexity,size,size"], 2, "is repeated", "once"),
        (["-t", "onnx", "--max-size", "big"], 2, "--max-size big: not a size", "300MB"),
        (["-t", "onnx", "--max-perplexity-increase", "x%"], 2, "not a share", "1%"),
        (["-t", "onnx", "--budget", "soon"], 2, "--budget soon: not a time", "20m"),
        (["-t", "onnx", "--budget", "20m", "--generations", "3"], 2, "cannot both be given", ""),
        (["-t", "onnx", "--population", "2"], 2, "population", ""),
        (["-t", "onnx", "--executor", "slurm"], 2, "unknown executor 'slurm'", "local, ray"),
        (["-t", "onnx", "--text", "nowhere.txt"], 10, "nowhere.txt: cannot be read", "give a text file"),
        (["-t", "onnx", "--held-out", "nowhere.txt"], 10, "nowhere.txt: cannot be read", "give a text file"),
    ],
)
def test_what_makes_no_sense_is_said(
    capsys: pytest.CaptureFixture[str],
    golden_model: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
    hint: str,
) -> None:
    found, said = run(capsys, [str(golden_model), *arguments, "-o", str(tmp_path / "search")])
    assert found == code, said
    assert message in said
    assert hint in said
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("target", "objectives", "message"),
    [
        ("tflite", "perplexity,prefill.p50", "target tflite also executes the experts of dropped slots in prefill"),
        ("onnx", "perplexity,prefill.p50", "the FLOP/s of this machine are unknown"),
    ],
)
def test_objectives_that_cannot_be_had_are_refused(
    capsys: pytest.CaptureFixture[str], golden_model: Path, tmp_path: Path, target: str, objectives: str, message: str
) -> None:
    arguments = [str(golden_model), "-t", target, "--objectives", objectives, "-o", str(tmp_path / "search")]
    code, said = run(capsys, arguments)
    assert code == 2
    assert message in said
    assert not (tmp_path / "search").exists()


def test_options_of_the_target_are_flags(
    capsys: pytest.CaptureFixture[str], golden_model: Path, tmp_path: Path
) -> None:
    arguments = [str(golden_model), "-t", "onnx", "--flavor", "portible", "-o", str(tmp_path / "search")]
    code, said = run(capsys, arguments)
    assert code == 2
    assert "flavor" in said
    assert "portable" in said
    assert not (tmp_path / "search").exists()


def test_no_tokenizer_is_said(capsys: pytest.CaptureFixture[str], golden_model: Path, tmp_path: Path) -> None:
    shutil.copytree(golden_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "texts", "*.npz"))
    code, said = run(capsys, [str(tmp_path / "model"), "-t", "onnx", "-o", str(tmp_path / "search")])
    assert code == 10
    assert "it has no tokenizer.json" in said
    assert not (tmp_path / "search").exists()


@pytest.fixture
def begun(golden_model: Path, tmp_path: Path) -> Path:
    """The directory of a search whose checkpoint is another one now."""
    content = {
        "schema_version": 1,
        "source": {"config.json": "0" * 64},
        "settings": {"checkpoint": str(golden_model), "target": "onnx"},
    }
    (tmp_path / "search.json").write_text(json.dumps(content))
    (tmp_path / "generations.jsonl").write_text("")
    return tmp_path


def test_a_search_of_another_checkpoint_is_not_gone_on_with(capsys: pytest.CaptureFixture[str], begun: Path) -> None:
    code, said = run(capsys, [str(begun), "--resume"])
    assert code == 10
    assert "is a search of another checkpoint" in said
    assert "config.json" in said


def test_a_search_is_gone_on_with_as_it_was_begun(capsys: pytest.CaptureFixture[str], begun: Path) -> None:
    code, said = run(capsys, [str(begun), "--resume", "--max-size", "3MB", "--seed", "4"])
    assert code == 2
    assert "seed, size cannot be given with --resume" in said


def test_a_search_is_not_written_over(
    capsys: pytest.CaptureFixture[str], golden_model: Path, begun: Path, tmp_path: Path
) -> None:
    code, said = run(capsys, [str(golden_model), "-t", "onnx", "-o", str(begun)])
    assert code == 2
    assert "already contains a search" in said
    assert "--resume" in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    code, said = run(capsys, [str(golden_model), "-t", "onnx", "-o", str(tmp_path / "other")])
    assert code == 11
    assert "does not contain a search" in said


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, 9),
        ("{", 9),
        ("{}", 9),
        ('{"schema_version": 1, "source": "text", "settings": {}}', 9),
        ('{"schema_version": 1, "source": {}, "settings": {}}', 2),
    ],
)
def test_what_is_no_search_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, code: int
) -> None:
    if content is not None:
        (tmp_path / "search.json").write_text(content)
    assert run(capsys, [str(tmp_path), "--resume"])[0] == code


def test_no_directory_is_said(capsys: pytest.CaptureFixture[str], golden_model: Path) -> None:
    code, said = run(capsys, [str(golden_model), "-t", "onnx"])
    assert code == 2
    assert "give -o DIRECTORY" in said


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5m", 90), ("2h", 7200), ("20min", 1200), ("3 s", 3)])
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("perplexity", "1%", 0.01),
        ("expert-flops", "0.6", 0.6),
        ("size", "1.5GB", 1.5e9),
        ("decode.p50", "12ms", 0.012),
        ("decode.p50", "2 s", 2.0),
        ("divergence", "0.02", 0.02),
    ],
)
def test_limits(name: str, text: str, value: float) -> None:
    assert parse_limit(OBJECTIVES[name], text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "text"), [("size", "0.3x"), ("perplexity", "-1%"), ("divergence", "1ms"), ("size", "")]
)
def test_what_is_no_limit_is_refused(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"--max-{name}"):
        parse_limit(OBJECTIVES[name], text)


def test_values_for_people() -> None:
    assert [item.name for item in parse_objectives("perplexity, size")] == ["perplexity", "size"]
    assert shown(OBJECTIVES["perplexity"], 0.0123) == "+1.23%"
    assert shown(OBJECTIVES["size"], 5.5e6) == "5.50 MB"
    assert shown(OBJECTIVES["decode.p50"], 0.0125) == "12.5 ms"
