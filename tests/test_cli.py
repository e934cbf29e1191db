import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec import cli, targets
from moec.compiler.common.errors import MoecError, UsageError
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.pipeline import captures
from moec.compiler.pipeline import export as pipeline
from moec.compiler.pipeline import gates as proof

Tiny = Callable[[str], Path]
PROGRAM = [sys.executable, "-c", "from moec.cli import main; main()"]
pytestmark = pytest.mark.usefixtures("fake_target", "captured_once")


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch, capture_of: Callable[..., Program]) -> None:
    """A capture takes seconds, and what these tests are about comes after it."""

    def cached(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Program:
        return capture_of(checkpoint.directory, dtype)

    monkeypatch.setattr(captures, "capture", cached)


@pytest.fixture
def artifact(tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "out"
    assert (
        cli.dispatch(["export", str(tiny_checkpoint("olmoe")), "-t", "fake", "-o", str(out), "--no-gates", "-q"]) == 0
    )
    capsys.readouterr()
    return out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["export", "--help"], ["chat", "--help"], ["serve", "--help"], ["--version"]]
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from moec.cli import dispatch; code = dispatch(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'onnx', 'numpy', 'yaml'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "moec" in done.stdout


def test_importing_moec_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import moec; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in done.stdout.split()} <= {"moec", "typing", "_typing", "collections"}


def test_flags_are_made_of_the_options_of_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["export", "--target", "fake", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Options of target fake" in text
    for part in ("--flavor plain|fancy", "--block-size integer", "--compress", "--no-compress", "(default: 32)"):
        assert part in text
    assert cli.dispatch(["export", "--help"]) == 0
    assert "--block-size" not in capsys.readouterr().out


def test_flags_reach_the_target_and_the_recipe_is_recorded(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("target: fake\ndtype: fp16\noptions: {block_size: 8, flavor: fancy}\n")
    flags = ["--recipe", str(tmp_path / "r.yaml"), "--block-size", "64", "--compress", "--devices", "a, b"]
    out = tmp_path / "out"
    assert cli.dispatch(["export", str(tiny_checkpoint("olmoe")), *flags, "-o", str(out), "--no-gates", "-q"]) == 0
    recipe = json.loads((out / "moec.json").read_text())["recipe"]
    options = {"flavor": "fancy", "block_size": 64, "compress": True, "devices": ["a", "b"], "delay": 0.0, "fault": ""}
    given = {key: value for key, value in recipe.items() if value is not None}
    assert given == {"target": "fake", "dtype": "fp16", "inputs_embeds": False, "options": options}


def test_export_as_json(tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["export", str(tiny_checkpoint("olmoe")), "-t", "fake", "-o", str(out), "--no-gates", "--json"]
    assert cli.dispatch(command) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["directory"] == str(out)
    assert {verdict["status"] for verdict in found["verdicts"]} == {"not run"}
    assert found["rejections"] == [{"source": "fake", "where": "lm_head", "reason": "it likes another layout"}]
    assert found["seconds"].keys() == {"capture", "passes", "lower", "package"}
    assert "capture: " in captured.err
    assert "\x1b" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("failing", "code"), [((), 0), (("parity: capture",), 5), (("parity: capture", "integrity"), 5), (("latency",), 6)]
)
def test_a_failed_gate_keeps_the_artifact_and_decides_the_exit_code(
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: tuple[str, ...],
    code: int,
) -> None:
    codes = {"parity: capture": 5, "integrity": 5, "latency": 6}
    verdicts = tuple(
        Verdict(gate, Status.FAIL if gate in failing else Status.PASS, "3 of 4", number)
        for gate, number in codes.items()
    )
    monkeypatch.setattr(proof, "run_gates", lambda *_args, **_kwargs: verdicts)
    out = tmp_path / "out"
    assert cli.dispatch(["export", str(tiny_checkpoint("olmoe")), "-t", "fake", "-o", str(out)]) == code
    captured = capsys.readouterr()
    assert cli.dispatch(["verify", str(out)]) == 0
    assert captured.out.count(" fail ") == len(failing)
    assert ("do not ship it" in captured.err) == bool(failing)
    statuses = [verdict["status"] for verdict in json.loads((out / "report.json").read_text())["verdicts"]]
    assert statuses.count("fail") == len(failing)


def test_gates_with_different_codes_end_with_12() -> None:
    failed = [Verdict(gate, Status.FAIL, "", code) for gate, code in (("parity", 5), ("latency", 6))]
    assert pipeline.Result(Path(), {}, tuple(failed), {}).exit_code == 12


def test_verify_and_a_flipped_byte(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["verify", str(artifact)]) == 0
    assert "files are unchanged since they were built" in capsys.readouterr().out
    data = bytearray((artifact / "model.bin").read_bytes())
    data[1000] ^= 1
    (artifact / "model.bin").write_bytes(data)
    assert cli.dispatch(["verify", str(artifact), "--json"]) == 9
    captured = capsys.readouterr()
    assert "model.bin differs" in captured.err
    assert json.loads(captured.out)["error"]["exit_code"] == 9


def test_validate_refuses_another_checkpoint(
    artifact: Path, tiny_checkpoint: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.dispatch(["validate", str(artifact), "--against", str(tiny_checkpoint("mixtral"))]) == 10
    assert "not the checkpoint" in capsys.readouterr().err


def test_validate_runs_the_gates_and_writes_the_report(
    artifact: Path, tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (artifact / "moec.json").read_bytes()
    monkeypatch.setattr(proof, "run_gates", lambda *_a, **_k: (Verdict("parity", Status.PASS, "equal", 5),))
    assert cli.dispatch(["validate", str(artifact), "--against", str(tiny_checkpoint("olmoe")), "-q"]) == 0
    assert "equal" in capsys.readouterr().out
    assert json.loads((artifact / "report.json").read_text())["verdicts"][0]["gate"] == "parity"
    assert (artifact / "moec.json").read_bytes() == before


def test_inspect_artifact_and_checkpoint(
    artifact: Path, tiny_checkpoint: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for location in (artifact, tiny_checkpoint("olmoe")):
        assert cli.dispatch(["inspect", str(location), "--json"]) == 0
        found[location] = json.loads(capsys.readouterr().out)
        assert cli.dispatch(["inspect", str(location)]) == 0
        text = capsys.readouterr().out
        assert "2 layers of 8, top-2, width 48" in text
    assert found[artifact].pop("summary")["next"][0]["command"] == f"moec chat {artifact}"
    described, checkpoint = found.values()
    assert "summary" not in checkpoint
    source = described["model"].pop("source")
    assert described["model"] == checkpoint["model"]
    assert source == {key: checkpoint["model"][key] for key in ("parameters", "moe_layers")}
    model = checkpoint["model"]
    experts = 2 * 8 * 3 * 64 * 48
    assert model["parameters"]["total"] == checkpoint["stored_parameters"]
    assert model["parameters"]["active"] == model["parameters"]["total"] - experts * 6 // 8
    assert model["states"] == {
        "count": 4,
        "layers": 2,
        "kinds": ["key", "value"],
        "bytes_per_token": 2 * 2 * 2 * 16 * 4,
        "cache_dtypes": ["float32"],
        "bytes_fixed": 0,
    }
    assert checkpoint["captured"] is True


def test_inspect_says_why_a_model_cannot_be_captured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert cli.dispatch(["inspect", str(tmp_path / "dense"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["captured"] is False
    assert "dense model" in found["reason"]


def test_json_says_whether_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = cli.dispatch([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    code, found = said("families")
    assert (code, next(iter(found.items()))) == (0, ("ok", True))
    code, found = said("verify", str(tmp_path))
    assert (code, found["ok"], found["error"]["exit_code"]) == (9, False, 9)
    # What the parser of the command line refuses.
    code, found = said("verify", str(tmp_path), "--nonsense")
    assert (code, found["ok"], found["error"]["exit_code"]) == (2, False, 2)
    code, found = said("nonsense")
    assert (code, found["ok"]) == (2, False)


def test_doctor_and_families(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["moec"] == moec.__version__
    assert found["targets"].keys() == set(targets.target_names())
    assert found["ok"] is True
    assert found["commands"]["serve"] == {"run": "yes", "install": ""}
    assert found["gaps"].get("pip install 'moec[ray]'", ["moec build --executor ray"]) == ["moec build --executor ray"]
    assert cli.dispatch(["doctor"]) == 0
    assert "fake" in capsys.readouterr().out
    monkeypatch.setattr("moec.compiler.commands.serve.MODULES", ("json", "no_such_module"))
    assert cli.dispatch(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "moec serve" in told
    assert "no: needs no_such_module" in told
    # One command for each gap, once.
    assert re.findall(r"^pip install 'moec\[serve\]' +# (.*)$", told, re.M) == ["moec serve"]
    assert told.count("moec[serve]") == 1
    assert cli.dispatch(["families"]) == 0
    assert "olmoe" in capsys.readouterr().out.split()
    assert cli.dispatch(["families", "olmo"]) == 2
    assert "did you mean 'olmoe'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "x", "--target", "onx"], ["unknown target 'onx'", "did you mean 'onnx'"]),
        (["export", "x", "--target", "fake"], ["no output directory", "-o"]),
        (["export", "--target", "fake", "-o", "o"], ["no checkpoint is given"]),
        (["export", "x", "-o", "o"], ["no target is given", "--target"]),
        (["export", "x", "-t", "fake", "-o", "o", "--flavor", "fanzy"], ["unknown value 'fanzy'", "'fancy'"]),
        (["export", "x", "-t", "fake", "-o", "o", "--block-size", "0"], ["block_size: Input should be"]),
        (["export", "x", "-t", "fake", "-o", "o", "--block-sise", "0"], ["No such option"]),
        (["export", "x", "-t", "fake", "-o", "o", "--recipe", "none.yaml"], ["none.yaml: cannot be read"]),
        (["frobnicate"], ["No such command"]),
    ],
)
def test_usage_errors(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(arguments) == 2
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert all(word in text for word in words), text


def test_two_targets_of_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_BUILT_IN", {"fake": "moec.targets.other:Other"})
    targets._table.cache_clear()
    with pytest.raises(UsageError, match="provided twice, by moec and moec-fake"):
        targets.get_target("fake")


def test_a_target_that_cannot_be_imported_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "moec_fake", None)
    assert cli.dispatch(["export", "x", "-t", "fake", "-o", "o"]) == 8
    assert "pip install --upgrade moec-fake" in capsys.readouterr().err
    assert cli.dispatch(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"]["fake"]["build"].startswith("no: ")


def test_a_fault_of_moec_writes_a_log_and_asks_for_a_report(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = ["export", str(tiny_checkpoint("olmoe")), "-t", "fake", "-o", str(tmp_path / "out"), "--fault", "crash"]
    assert cli.dispatch(command) == 70
    text = capsys.readouterr().err
    assert "ZeroDivisionError: a fault that nobody foresaw" in text
    assert "stage: lower" in text
    assert "please report it" in text
    assert "Traceback" not in text
    (log,) = tmp_path.glob("moec-*.log")
    assert str(log) in text
    assert "Traceback" in log.read_text()
    assert not (tmp_path / "out").exists()
    assert cli.dispatch([*command, "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_what_the_target_cannot_lower_is_named(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(tiny_checkpoint("olmoe")), "-t", "fake", "-o", str(tmp_path / "out"), "--fault", "refuse"]
    assert cli.dispatch(command) == 4
    assert "model.layers.0.mlp: it was told to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_python_api(tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    result = moec.export(
        tiny_checkpoint("olmoe"),
        target="fake",
        output=tmp_path / "out",
        gates=False,
        block_size=16,
        progress=lambda name, _done, _total: steps.append(name),
    )
    assert result.exit_code == 0
    assert result.manifest["recipe"]["options"]["block_size"] == 16
    assert "write weights" in steps
    failed = (Verdict("parity", Status.FAIL, "far off", 5),)
    monkeypatch.setattr(proof, "run_gates", lambda *_a, **_k: failed)
    with pytest.raises(MoecError, match="parity: far off") as caught:
        moec.export(tiny_checkpoint("olmoe"), target="fake", output=tmp_path / "out", overwrite=True)
    assert caught.value.exit_code == 5
    with pytest.raises(AttributeError, match="no_such_name"):
        moec.no_such_name  # noqa: B018


def test_a_reader_that_goes_away_ends_the_run_quietly(
    artifact: Path, golden_model: Path, fake_target: dict[str, str]
) -> None:
    (artifact / "tokenizer.json").write_bytes((golden_model / "tokenizer.json").read_bytes())
    command = [*PROGRAM, "run", str(artifact), "--prompt", "a", "--max-new-tokens", "400"]
    read, write = os.pipe()
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, env=fake_target, text=True)
    os.close(write)
    os.close(read)
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode == 0
