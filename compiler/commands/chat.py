"""`moec chat`: a conversation with an artifact, without torch."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from moec.compiler.commands.console import Console, write
from moec.compiler.commands.generation import argument_text
from moec.compiler.commands.options import ArtifactDirectory, DebugOutput, Generation, Sampling
from moec.compiler.common.errors import MoecError, UsageError

if TYPE_CHECKING:
    from moec.compiler.run.conversation import Conversation
    from moec.compiler.run.session import Statistics

HELP = """\
/reset        start a new conversation; the system prompt stays
/system TEXT  set the system prompt; without TEXT, remove it
/stats        show counts of the last answer and of the conversation
/help         show this help
/exit         end, as Ctrl-D does. Ctrl-C stops an answer and keeps the conversation.
A line that begins with // is sent as a turn that begins with /."""


def chat(
    sampling: Sampling,
    generation: Generation,
    console: Annotated[Console, DebugOutput],
    directory: ArtifactDirectory,
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system prompt.")] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete each line on its own, without chat template and history.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of an answer.")] = 1024,
) -> int:
    """Hold a conversation with a model, from the artifact alone.

    In a pipe each line is a turn. Answers go to stdout, everything else to stderr. A model without a chat template
    completes each line on its own, as with --raw.
    """
    from moec.compiler.common.model_config import chat_template
    from moec.compiler.run.conversation import Conversation

    generator = generation.generator(directory, console)
    if not raw and not system and chat_template(generator.directory) is None:
        console.note("the model has no chat template: each line is completed on its own, as with --raw")
        raw = True
    with generator.session() as session:
        conversation = Conversation(
            generator,
            session,
            sampling=generator.sampling(**vars(sampling)),
            max_new_tokens=max_new_tokens,
            stop=generation.stop or (),
            system=argument_text(system, "--system"),
            raw=raw,
        )
        return _Chat(console, conversation, stats=generation.stats, terminal=sys.stdin.isatty()).run()


class _Chat:
    """Reads turns and commands, and shows answers.

    Args:
        console: The streams of the command.
        conversation: The conversation.
        stats: Whether to print counts after every answer.
        terminal: Whether stdin is a terminal. If not, a turn that cannot be answered ends the program.
    """

    def __init__(self, console: Console, conversation: Conversation, *, stats: bool, terminal: bool) -> None:
        self.console, self.conversation, self.stats, self.terminal = console, conversation, stats, terminal

    def run(self) -> int:
        """Answer turns until the input ends, /exit, or the reader of stdout is gone; return the exit code."""
        if self.terminal:
            self.console.note("/help lists the commands; Ctrl-D ends")
        for line in self._lines():
            if not (line := line.strip()):
                continue
            try:
                if not self._turn(line):
                    break
            except MoecError as error:
                if not self.terminal:
                    raise
                self.console.error(error)
        return 0

    def _lines(self) -> Iterator[str]:
        if not self.terminal:
            for line in sys.stdin.buffer:
                yield _decoded(line)
            return
        import readline  # noqa: F401 - gives `input` line editing and a history

        while True:
            try:
                yield input("> ")
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write("\n")
                self.console.note("Ctrl-D or /exit ends")

    def _turn(self, line: str) -> bool:
        """Run a command or answer a turn; return False if it is the last line."""
        if line.startswith("//") or not line.startswith("/"):
            return self._answer(line[1:] if line.startswith("//") else line)
        command, _, rest = line[1:].partition(" ")
        if command == "exit":
            return False
        commands = {"reset": self._reset, "system": self._system, "stats": self._stats, "help": self._help}
        if command not in commands:
            raise UsageError(f"no command '/{command}'", hint="/help lists them; // begins a turn with /")
        commands[command](rest.strip())
        return True

    def _answer(self, text: str) -> bool:
        """Print the answer to a turn; return False if the reader of stdout is gone."""
        pieces = self.conversation.ask(text)
        with _interruptible(self.terminal) as stopped:
            for piece in pieces:
                if not write(piece):
                    return False
                if stopped.is_set():
                    pieces.close()
        if not write("\n"):
            return False
        counts = self.conversation.statistics
        if self.conversation.is_full:
            self.console.note("the context is full: /reset starts a new conversation")
        elif counts.finish == "length":
            self.console.note(f"the answer was cut at {counts.new_tokens} tokens (--max-new-tokens)")
        if self.stats:
            self._note(counts)
        return True

    def _reset(self, _rest: str) -> None:
        self.conversation.reset()
        self.console.note("a new conversation")

    def _system(self, rest: str) -> None:
        self.conversation.system = rest
        self.console.note("the system prompt is set" if rest else "there is no system prompt")

    def _stats(self, _rest: str) -> None:
        counts, limit = self.conversation.statistics, self.conversation.generator.context_length
        turns = sum(message["role"] == "user" for message in self.conversation.messages)
        used = counts.prompt_tokens + counts.new_tokens
        self._note(counts)
        self.console.note(f"turns: {turns}; context: {used} tokens" + (f" of {limit}" if limit else ""))

    def _note(self, counts: Statistics) -> None:
        for line in counts.lines():
            self.console.note(line)

    def _help(self, _rest: str) -> None:
        self.console.note(HELP)


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input: not UTF-8 text (byte {error.start} of a line)", hint="convert it to UTF-8"
        ) from error


@contextmanager
def _interruptible(wanted: bool) -> Iterator[threading.Event]:
    """Let Ctrl-C set an event, so that no step is interrupted midway; a second one raises KeyboardInterrupt."""
    event = threading.Event()

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, interrupt) if wanted else None
    try:
        yield event
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
