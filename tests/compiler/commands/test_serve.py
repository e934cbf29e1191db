"""`moec serve` as a program: what it refuses, and that it ends as it should."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from moec import cli
from moec.compiler.commands import serve


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_a_network_is_let_in_with_a_key_alone(
    host: str, golden_onnx: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MOEC_API_KEY", raising=False)
    assert cli.dispatch(["serve", str(golden_onnx), "--host", host]) == 2
    told = capsys.readouterr().err
    assert "there is no API key" in told
    assert "--no-key" in told
    serve._check_reach(host, "key", no_key=False)
    serve._check_reach(host, None, no_key=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    serve._check_reach(host, None, no_key=False)


def test_without_the_extra(
    golden_onnx: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "MODULES", ("json", "no_such_module"))
    assert cli.dispatch(["serve", str(golden_onnx)]) == 8
    told = capsys.readouterr().err
    assert "no_such_module" in told
    assert "pip install 'moec[serve]'" in told


def test_a_port_that_is_taken(golden_onnx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.dispatch(["serve", str(golden_onnx), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


def test_it_answers_until_it_is_interrupted(golden_onnx: Path) -> None:
    code = (
        "import sys; from moec.cli import dispatch; code = dispatch(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "serve", str(golden_onnx), "--port", "0", "--threads", "1"]
    environment = {**os.environ, "MOEC_API_KEY": "s3cret"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    address = process.stderr.readline().split(" at ")[1].split(";")[0]
    body = json.dumps({"model": golden_onnx.name, "prompt": "The", "max_tokens": 4}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/completions", body, headers), timeout=30) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (0, "ended\n")
