"""What commands say on stderr: text or JSON lines, rates and time left, colours on terminals alone."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moec import cli
from moec.compiler.commands import console, progress_view
from moec.compiler.commands.console import Console
from moec.compiler.common.progress import in_megabytes
from moec.compiler.pipeline.stages import Stages


@pytest.fixture(autouse=True)
def own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(console.LOG_FORMAT, "text")


def steps(seen: Console, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 20 parts, each of which takes `seconds` by a clock of the test's own."""
    now = iter(range(1000))
    monkeypatch.setattr(progress_view.time, "perf_counter", lambda: next(now) * seconds)
    with seen.progress() as update:
        for done in range(21):
            update("weights", done, 20)


def test_a_long_step_tells_the_time_elapsed_and_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(Console(), 2.0, monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "weights: 3 of 20, 6.0 s elapsed, 34.0 s left"
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


def on_a_terminal(*command: str) -> str:
    """What a command writes on a terminal of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    ours, theirs = pty.openpty()
    deadline = time.monotonic() + 60
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**kept, "TERM": "xterm-256color"}
    ) as process:
        os.close(theirs)
        shown = io.BytesIO()
        while time.monotonic() < deadline:
            try:
                shown.write(os.read(ours, 4096))
            except OSError:
                break
        process.wait()
    os.close(ours)
    return shown.getvalue().decode()


def plain(shown: str) -> str:
    """Without the escape sequences of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


STEPS = """
from moec.compiler.commands.console import Console
from moec.compiler.common.errors import UsageError
seen = Console()
with seen.progress() as update:
    update("gates", 0, 1)
    for done in range(4):
        update("weights", done, 3)
        seen._err.file.flush()
        __import__("time").sleep(0.25)
    update("weights", 3, 3)
    update("latency", 2, 9)
    update("gates", 1, 1)
seen.error(UsageError("wrong"))
"""


def test_colours_and_bars_are_for_terminals_alone() -> None:
    command = [sys.executable, "-c", STEPS]
    environment = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    piped = subprocess.run(command, capture_output=True, check=True, env=environment).stderr
    assert b"\x1b" not in piped
    assert re.fullmatch(rb"weights: 0\.\d s\ngates: \d\.\d s\nerror: wrong\nhint: .*\n", piped)
    shown = on_a_terminal(*command)
    assert "\x1b[1;31m" in shown
    text = plain(shown)
    assert re.search(r"weights [━╸╺]+ 2 of 3 0\.\d s elapsed, 0\.\d s left", text)
    assert "loading" in text
    # A step that ended is a line, once; one that stopped early leaves nothing.
    assert len(re.findall(r"^weights: \d\.\d s\s*$", text.replace("\r", "\n"), re.M)) == 1
    assert "latency:" not in text


@pytest.mark.parametrize(
    ("flags", "told"), [([], True), (["-q"], False), (["--log-format", "json"], False), (["--help"], False)]
)
def test_a_command_says_at_once_that_it_is_loading(flags: list[str], told: bool, tmp_path: Path) -> None:
    code = "import sys; from moec.cli import main; main()"
    shown = on_a_terminal(sys.executable, "-c", code, "verify", str(tmp_path), *flags)
    assert shown.startswith("  loading\r\x1b[K") is told
    assert ("loading" in shown) is told
    assert "--help" in flags or "not an artifact" in shown


def test_steps_that_repeat_and_steps_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(progress_view.time, "perf_counter", lambda: float(next(now)))
    told: list[str] = []
    update = progress_view.lines(lambda text, **_: told.append(text))
    update("formats", 3, 3)
    update("formats", 3, 3)
    assert told == ["formats: 0.0 s"]
    update("formats", 0, 3)
    update("formats", 3, 3)
    update("search", 5, 0)
    assert [line.split(":")[0] for line in told] == ["formats", "formats"]
    told.clear()
    # What a step that ended had opened begins anew when it comes again.
    for call in (("gates", 0, 1), ("latency", 2, 9), ("gates", 1, 1), ("latency", 0, 9), ("latency", 9, 9)):
        update(*call)
    assert told == ["gates: 2.0 s", "latency: 1.0 s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (245, "4 min 05 s"), (3600 * 2 + 420, "2 h 07 min")],
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert progress_view.duration(seconds) == text


def test_bytes_are_told_in_megabytes_and_the_last_one_ends_the_step() -> None:
    seen: list[tuple[str, int, int]] = []
    told = in_megabytes(lambda *call: seen.append(call), "weights")
    for done in (0, 900_000, 2_600_000, 2_999_999, 3_000_000):
        told(done, 3_000_000)
    assert seen == [("weights, MB", done, 3) for done in (0, 1, 2, 2, 3)]
    seen.clear()
    told(10, 20)
    told(20, 20)
    assert seen == [("weights, MB", 0, 1), ("weights, MB", 1, 1)]


def test_passes_are_one_step_with_a_count() -> None:
    seen: list[tuple[str, int, int]] = []
    with Stages(lambda *call: seen.append(call))("passes", 3) as one_is_done:
        one_is_done(None)
        one_is_done(None)
    assert seen == [("passes", done, 3) for done in range(4)]
