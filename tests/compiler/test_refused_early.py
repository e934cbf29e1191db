"""What cannot work is refused before anything is captured: with a message, a hint and its exit code."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from moec import cli
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.pipeline import captures

CASES = {
    "a cache beyond the context, CoreML": (["-t", "coreml", "--context", "99999"], 2, "made for 512 tokens"),
    "a cache beyond the context, TFLite": (["-t", "tflite", "--context", "99999"], 2, "made for 512 tokens"),
    "a cache beyond the context, TensorRT": (["-t", "tensorrt", "--context", "99999"], 2, "made for 512 tokens"),
    "a prompt beyond the cache": (
        ["-t", "tflite", "--context", "64", "--prefill", "128"],
        2,
        "longer than the KV cache",
    ),
    "a policy that is not told how much to save": (["-t", "onnx", "--routing", "threshold"], 2, "--expert-budget"),
    "an unknown policy": (["-t", "onnx", "--routing", "tresholds", "--expert-budget", "0.5"], 2, "threshold"),
    "a calibration file that is none": (["-t", "onnx", "--routing", "top-p", "--calibration", "x.json"], 2, "x.json"),
    "a routing text that is missing": (
        ["-t", "onnx", "--routing", "top-p", "--expert-budget", "0.5", "--routing-text", "no.txt"],
        10,
        "no.txt",
    ),
    "an unknown format": (["-t", "onnx", "--quantize", "int9"], 2, "int9"),
    "a calibration text that is missing": (
        ["-t", "onnx", "--quantize", "int4", "--calibration", "no.txt"],
        10,
        "no.txt",
    ),
    "a held-out text that is missing": (
        ["-t", "onnx", "--max-quality-loss", "1%", "--quality-text", "no.txt"],
        10,
        "no",
    ),
    "a KV cache in codes": (["-t", "onnx", "--kv-cache", "int8"], 2, "keeps keys and values in floats"),
    "a KV cache in codes, TFLite": (["-t", "tflite", "--kv-cache", "int8"], 2, "leave it out"),
    "an unknown format of the KV cache": (["-t", "onnx", "--kv-cache", "float8"], 2, "float, int8"),
    "a budget that is none": (["-t", "onnx", "--latency-budget", "decode.p50=fast"], 2, "fast"),
    "an output that is a file": (["-t", "onnx", "-o", "file"], 11, "is a file"),
}


@pytest.fixture
def nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(checkpoint: Checkpoint, **_: object) -> NoReturn:
        raise AssertionError(f"{checkpoint.directory} is captured before the command line is checked")

    monkeypatch.setattr(captures, "capture", capture)


@pytest.fixture
def export(
    nothing_is_captured: None,  # noqa: ARG001
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """Exports a tiny OLMoE from an empty directory: exit code, and what is said on stderr."""
    monkeypatch.chdir(tmp_path)
    checkpoint = str(tiny_checkpoint("olmoe"))
    return lambda *flags: (cli.dispatch(["export", checkpoint, "-o", "out", *flags]), capsys.readouterr().err)


@pytest.mark.parametrize("name", CASES)
def test_before_capture(name: str, export: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    arguments, code, message = CASES[name]
    (tmp_path / "file").touch()
    found, said = export(*arguments)
    assert found == code
    assert message in said
    assert "hint: " in said
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize(
    ("target", "module"), [("coreml", "coremltools"), ("tflite", "ai_edge_litert"), ("tensorrt", "tensorrt_rtx")]
)
def test_an_extra_that_is_missing(
    target: str, module: str, export: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    hidden = {module, "tensorrt"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    code, said = export("-t", target)
    assert code == 8
    assert f"needs {module}, which is not installed" in said
    assert f"pip install 'moec[{target}]'" in said


@pytest.mark.parametrize(
    ("flags", "needed"),
    [((), 4), (("--dtype", "fp16"), 2), (("--quantize", "int4"), 0.5), (("--prune-experts", "0.5"), 2)],
)
def test_a_disk_without_room(
    flags: tuple[str, ...],
    needed: float,
    export: Callable[..., tuple[int, str]],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the weights is certain; the rest may be what the artifact does not hold."""
    checkpoint = tiny_checkpoint("olmoe")
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "float32"
    weights = (checkpoint / "model.safetensors").stat().st_size / 4
    enough = math.ceil(weights * needed / 2)
    for free, code, message in ((enough - 1, 11, "its disk has"), (enough + 1, 70, "is captured")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _place, free=free: types.SimpleNamespace(free=free))
        found, said = export("-t", "onnx", *flags, "--debug")
        assert found == code
        assert message in said
    assert not list(tmp_path.iterdir())


NEEDS_TORCH = ("an unknown policy",)
"""Cases that are noticed once torch is imported: policies compute with it."""


def test_a_refusal_waits_for_no_slow_import(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """All other cases in one process, which must not have imported what takes seconds."""
    (tmp_path / "file").touch()
    lines = {
        name: ["export", str(tiny_checkpoint("olmoe")), "-o", "out", *arguments]
        for name, (arguments, _, _) in CASES.items()
        if name not in NEEDS_TORCH
    }
    code = (
        "import json, sys; from moec import cli; lines = json.loads(sys.argv[1]);"
        "codes = {name: cli.dispatch(line) for name, line in lines.items()};"
        "print(json.dumps([codes, [name for name in ('torch', 'transformers', 'scipy') if name in sys.modules]]))"
    )
    command = [sys.executable, "-c", code, json.dumps(lines)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert imported == []
    assert codes == {name: CASES[name][1] for name in lines}
