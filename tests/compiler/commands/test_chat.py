"""`moec chat` from a pipe and at a terminal."""

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import moec
from moec import cli
from moec.compiler.commands import chat

LINE = "The list of arguments is"


class Typed:
    """Standard input that is a pipe."""

    def __init__(self, *lines: str | bytes) -> None:
        self.buffer = io.BytesIO(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))

    def isatty(self) -> bool:
        return False


def talk(monkeypatch: pytest.MonkeyPatch, out: Path, lines: list[str | bytes], *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", Typed(*lines))
    return cli.dispatch(["chat", str(out), "--max-new-tokens", "8", *flags])


def test_a_line_is_a_turn(
    golden_onnx: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [LINE, "/stats", "", "Return it", "/reset", "/system", LINE, "/exit", "never"]
    assert talk(monkeypatch, golden_onnx, list(lines), "--stats") == 0
    said, told = capsys.readouterr()
    alone = moec.load(golden_onnx).generate(LINE, chat=True, max_new_tokens=8)
    assert said.startswith(alone + "\n")
    assert said.endswith(alone + "\n")
    assert said.count(alone) == 2
    assert len(re.findall("^prompt: .* tokens/s$", told, re.MULTILINE)) == 4
    assert re.search(r"^turns: 1; context: \d+ tokens of 1024$", told, re.MULTILINE)
    assert "cut at 8 tokens (--max-new-tokens)" in told
    assert "a new conversation" in told
    assert "there is no system prompt" in told


def test_flags(golden_onnx: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generator = moec.load(golden_onnx)
    whole = generator.generate(LINE, max_new_tokens=8)
    assert talk(monkeypatch, golden_onnx, [LINE], "--raw", "--stop", whole[5:7]) == 0
    assert capsys.readouterr().out == whole[:5] + "\n"
    messages = [{"role": "system", "content": "SQL"}, {"role": "user", "content": "/" + LINE}]
    wanted = generator.generate(generator.encode_chat(messages), max_new_tokens=8)
    assert talk(monkeypatch, golden_onnx, ["//" + LINE], "--system", "SQL") == 0
    assert capsys.readouterr().out == wanted + "\n"
    assert talk(monkeypatch, golden_onnx, ["/system SQL", "//" + LINE]) == 0
    assert capsys.readouterr().out == wanted + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/what", "no command '/what'"),
        ("word " * 1100, "context is full: the text has"),
        (b"Hell\xff\n", "standard input: not UTF-8 text (byte 4"),
    ],
)
def test_what_cannot_be_answered_ends_a_pipe(
    golden_onnx: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str | bytes,
    message: str,
) -> None:
    assert talk(monkeypatch, golden_onnx, [line, LINE]) == 2
    said, told = capsys.readouterr()
    assert message in told
    assert not said


class Endless:
    """A conversation whose answers never end; Ctrl-C comes after the third piece."""

    def __init__(self) -> None:
        self.closed = False
        self.is_full = False

    def ask(self, text: str) -> Iterator[str]:
        try:
            for count in range(100):
                if count == 3:
                    signal.raise_signal(signal.SIGINT)
                yield text
        finally:
            self.closed = True

    class statistics:  # noqa: N801 - an object with what is read of it
        finish = ""


def test_ctrl_c_stops_an_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Endless()
    before = signal.getsignal(signal.SIGINT)
    loop = chat._Chat(chat.Console(), conversation, stats=False, terminal=True)  # type: ignore[arg-type]
    assert loop._answer("a")
    assert capsys.readouterr().out == "aaaa\n"
    assert conversation.closed
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_it() -> None:
    with chat._interruptible(wanted=True) as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def read_until(terminal: int, text: str, seconds: float = 60) -> str:
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096).decode()
    return seen


def test_at_a_terminal(golden_onnx: Path) -> None:
    """Errors are shown and it goes on; it imports no torch."""
    code = (
        "import sys; from moec.cli import dispatch; code = dispatch(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys(); sys.exit(code)"
    )
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-c", code, "chat", str(golden_onnx), "--max-new-tokens", "8"]
    environment = {**os.environ, "TERM": "dumb"}  # readline writes nothing but the text
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    read_until(terminal, "> ")
    os.write(terminal, b"/what\n")
    read_until(terminal, "> ")
    os.write(terminal, LINE.encode() + b"\n")
    alone = moec.load(golden_onnx).generate(LINE, chat=True, max_new_tokens=8)
    assert alone.splitlines()[0] in read_until(terminal, "> ")
    os.write(terminal, b"\x04")
    _, errors = process.communicate(timeout=60)
    os.close(terminal)
    told = errors.decode()
    assert process.returncode == 0, told
    assert "/help lists the commands" in told
    assert "no command '/what'" in told


def test_a_model_without_a_template_completes_lines(
    golden_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the golden model is, which the README's first command exports."""
    out = tmp_path / "out"
    shutil.copytree(golden_onnx, out)
    (out / "chat_template.jinja").unlink()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINE.encode() + b"\n")))
    assert cli.dispatch(["chat", str(out), "--max-new-tokens", "8", "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert moec.load(out).generate(LINE, max_new_tokens=8, temperature=0).strip() in shown.out
    assert "each line is completed on its own, as with --raw" in shown.err
    assert cli.dispatch(["chat", str(out), "--system", "Be brief."]) == 2
    assert "give --raw to complete each line on its own" in capsys.readouterr().err
