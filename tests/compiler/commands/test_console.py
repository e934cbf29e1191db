"""What commands say on stderr: text or JSON lines, rates and time left, colours on terminals alone."""

import io
import json
import os
import pty
import subprocess
import sys
import time

import pytest

from moec import cli
from moec.compiler.commands import console
from moec.compiler.commands.console import Console


@pytest.fixture(autouse=True)
def own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(console.LOG_FORMAT, "text")


def steps(seen: Console, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 20 parts, each of which takes `seconds` by a clock of the test's own."""
    now = iter(range(1000))
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(now) * seconds)
    with seen.progress() as update:
        for done in range(21):
            update("weights", done, 20)


def test_a_long_step_tells_its_rate_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(Console(), 2.0, monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "weights: 3 of 20, 2 s each, 34 s left"
    assert lines[-1] == "weights: 40.0 s"
    assert len(lines) == 7


def test_a_short_step_is_one_line_and_quiet_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(Console(), 0.01, monkeypatch)
    assert capsys.readouterr().err == "weights: 0.2 s\n"
    steps(Console(quiet=True), 2.0, monkeypatch)
    assert capsys.readouterr().err == ""


def test_json_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps(Console(log_json=True), 2.0, monkeypatch)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0].items() >= {"level": "info", "step": "weights", "done": 3, "rate": 0.5, "seconds_left": 34}.items()
    assert lines[-1]["seconds"] == 40
    assert all("time" in line for line in lines)


@pytest.mark.parametrize("arguments", [["--log-format", "json", "verify"], ["verify", "--log-format=json"]])
def test_the_flag_stands_anywhere(
    arguments: list[str], tmp_path: os.PathLike[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.dispatch([*arguments, str(tmp_path)]) == 9
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert json.loads(line)["exit_code"] == 9
    assert "not an artifact" in json.loads(line)["message"]


def test_a_wrong_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["doctor", "--log-format", "xml"]) == 2
    assert "text or json" in capsys.readouterr().err


def test_colours_and_bars_are_for_terminals_alone() -> None:
    code = (
        "from moec.compiler.commands.console import Console; from moec.compiler.common.errors import UsageError\n"
        "seen = Console()\n"
        "with seen.progress() as update:\n    [update('weights', done, 3) for done in range(4)]\n"
        "seen.error(UsageError('wrong'))"
    )
    command = [sys.executable, "-c", code]
    environment = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    piped = subprocess.run(command, capture_output=True, check=True, env=environment).stderr
    assert b"\x1b" not in piped
    assert b"weights: " in piped
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stderr=theirs, env={**environment, "TERM": "xterm-256color"}) as process:
        os.close(theirs)
        shown = io.BytesIO()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                shown.write(os.read(ours, 4096))
            except OSError:
                break
        process.wait()
    os.close(ours)
    assert b"\x1b[1;31m" in shown.getvalue()
    assert b"3/3" in shown.getvalue()
