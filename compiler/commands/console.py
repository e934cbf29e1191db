"""The output of a command: results on stdout for programs or people, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import moec
from moec.compiler.common.errors import MoecError
from moec.compiler.report.describe import describe_file, remarks

if TYPE_CHECKING:
    import rich.console
    import rich.text

    from moec.compiler.common.progress import Progress
    from moec.compiler.pipeline.export import Result

INTERNAL, INTERRUPTED = 70, 130
LOG_FORMAT = "MOEC_LOG_FORMAT"
"""Environment variable for the format of stderr, "text" or "json"; `--log-format` sets it."""
_STYLES = {
    "pass": "green",
    "fail": "bold red",
    "too noisy": "bold red",
    "not run": "yellow",
    "yes": "green",
    "no": "red",
}


@dataclass
class Console:
    """The two streams of a command.

    Attributes:
        json: Whether results and errors are printed as JSON on stdout.
        quiet: Whether to omit progress and notes.
        debug: Whether to print the traceback of an error.
        log_json: Whether stderr has one JSON object per line.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    log_json: bool = field(default_factory=lambda: os.environ.get(LOG_FORMAT) == "json")

    @cached_property
    def _out(self) -> rich.console.Console:
        from rich.console import Console as RichConsole

        return RichConsole(markup=False, highlight=False, emoji=False)

    @cached_property
    def _err(self) -> rich.console.Console:
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True, markup=False, highlight=False, emoji=False)

    def result(self, value: Mapping[str, Any], show: Callable[[], None], code: int = 0) -> None:
        """Print `value` as JSON, with `ok` before it, or call `show`.

        Args:
            value: The result of the command.
            show: Prints the result for people.
            code: Exit code of the command; `ok` is whether it is 0.
        """
        if self.json:
            write(as_json({"ok": not code, **value}) + "\n")
        else:
            show()

    def line(self, text: str) -> None:
        """Print a line on stdout without wrapping it."""
        self._out.print(text, soft_wrap=True)

    def show(self, text: rich.text.Text) -> None:
        """Print a styled text on stdout."""
        self._out.print(text, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line on stderr, unless quiet."""
        if self.quiet:
            return
        if self.log_json:
            self._log("info", message=text)
        else:
            self._err.print(text, style="dim", soft_wrap=True)

    def rows(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        """Print a table on stdout."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=bool(header), pad_edge=False, header_style="bold")
        materialised = [tuple(row) for row in rows]
        width = max((len(row) for row in materialised), default=len(header))
        for position in range(width):
            table.add_column(header[position] if header else "", overflow="fold", no_wrap=not position)
        for row in materialised:
            cells = [Text(cell, style=_STYLES.get(cell, "")) for cell in row[1:]]
            table.add_row(Text(row[0], style="bold"), *cells)
        self._out.print(table)

    def pieces(self, pieces: Iterable[str]) -> str:
        """Print text on stdout piece by piece and return the whole; stop quietly when the reader is gone."""
        written = []
        for piece in pieces:
            written.append(piece)
            if not write(piece):
                return "".join(written)
        write("\n")
        return "".join(written)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Print the summary of an artifact (`moec.compiler.report.summary`) on stdout, and the next commands."""
        from moec.compiler.report.summary import command_lines, summary_rows

        self.rows(summary_rows(summary))
        self.line("")
        self.line("\n".join(command_lines(summary)))

    def verdicts(self, result: Result, checkpoint: str) -> int:
        """Print verdicts and summary of an export or a validation of `checkpoint`; return the exit code."""
        from moec.compiler.report.summary import summarise
        from moec.compiler.report.write import file_sizes

        judged = [
            {"gate": v.gate, "status": str(v.status), "summary": v.summary, "figures": dict(v.figures)}
            for v in result.verdicts
        ]
        foreign = result.manifest.get("foreign")
        found = {
            "directory": str(result.directory),
            "exit_code": result.exit_code,
            "verdicts": judged,
            "rejections": result.manifest.get("rejections", []),
            "seconds": dict(result.timings),
            **({"foreign": foreign} if foreign else {}),
            "summary": summarise(
                result.manifest,
                file_sizes(result.directory) if result.files is None else result.files,
                judged,
                directory=str(result.directory),
                checkpoint=checkpoint,
            ),
        }

        def show() -> None:
            self._trade_off(result.manifest)
            if noted := remarks(result.manifest.get("model", {})):
                self.rows(noted)
            if foreign:
                self.rows(describe_file(foreign))
            self.rows([(v.gate, str(v.status), v.summary) for v in result.verdicts], header=("gate", "verdict", ""))
            self.line(f"{result.directory}: {sum(result.timings.values()):.1f} s; report.html has the details")
            self.line("")
            self.summary(found["summary"])

        self.result(found, show, result.exit_code)
        if result.failed:
            self.note("a gate failed: the artifact is kept so that it can be examined; do not ship it")
        return result.exit_code

    def _trade_off(self, manifest: Mapping[str, Any]) -> None:
        """Print the curve from which `--quantize auto` chose, if it was used."""
        found = manifest.get("quantization", {}).get("auto")
        if found is None:
            return
        points = [(point, "") for point in found["trade_off"]] + [(found["chosen"], "chosen")]
        rows = [
            (
                f"{point['bytes'] / 1e6:.2f}",
                f"{point['share_of_fp16']:.3f}",
                f"{point['predicted_increase']:+.3%}",
                mark,
            )
            for point, mark in sorted(points, key=lambda row: row[0]["bytes"])
        ]
        self.rows(rows, header=("weights, MB", "of fp16", "perplexity, predicted", ""))
        self.line("")

    def error(self, error: MoecError) -> int:
        """Print message and hint; return the exit code."""
        self._complain(error.message, error.hint, error.exit_code, getattr(error, "__notes__", ()))
        if self.debug:
            traceback.print_exception(error)
        return error.exit_code

    def crash(self, error: Exception) -> int:
        """Report an internal error and the place of its details; return the exit code."""
        where = "the traceback is above"
        if self.debug or not (path := _write_crash_log(error)):
            traceback.print_exception(error)
        else:
            where = f"the details are in {path}"
        message = f"internal: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        hint = f"this is a fault of moec; please report it: {where}"
        self._complain(message, hint, INTERNAL, getattr(error, "__notes__", ()))
        return INTERNAL

    def interrupted(self) -> int:
        """Print that nothing was written; return the exit code."""
        if self.log_json:
            self._log("error", message="interrupted; nothing was written", exit_code=INTERRUPTED)
        else:
            self._tell("interrupted; nothing was written")
        self._json_error("interrupted", "", INTERRUPTED)
        return INTERRUPTED

    def wrong_usage(self, code: int) -> int:
        """Print as JSON that the command line is wrong, which stderr has explained; return the exit code."""
        self._json_error("the command line is wrong; stderr says how", "moec COMMAND --help lists the options", code)
        return code

    def _complain(self, message: str, hint: str, code: int, notes: Sequence[str]) -> None:
        if self.log_json:
            self._log("error", message=message, hint=hint, exit_code=code, notes=list(notes))
        else:
            self._tell(f"error: {message}", "bold red")
            for note in notes:
                self._tell(note, "dim")
            if hint:
                self._tell(f"hint: {hint}")
        self._json_error(message, hint, code)

    def _tell(self, text: str, style: str = "") -> None:
        """Print a line on stderr; without style if there is too little memory to load rich."""
        try:
            self._err.print(text, style=style, soft_wrap=True)
        except (ImportError, MemoryError, SystemError):
            print(text, file=sys.stderr)

    def _log(self, level: str, **fields: Any) -> None:
        """Print a line of JSON on stderr."""
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"time": when, "level": level, **fields}, ensure_ascii=False), file=sys.stderr, flush=True)

    def _json_error(self, message: str, hint: str, code: int) -> None:
        if self.json:
            error = {"message": message, "hint": hint, "exit_code": code}
            write(as_json({"ok": False, "error": error}) + "\n")

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield a Progress: bars on a terminal, a line for each finished step elsewhere, nothing if quiet."""
        from moec.compiler.commands import progress_view

        if self.quiet:
            yield lambda _name, _done, _total: None
        elif self._err.is_terminal and not self.log_json:
            with progress_view.bars(self._err) as update:
                yield update
        else:
            yield progress_view.lines(self._print)

    def _print(self, text: str, **fields: Any) -> None:
        """Print a line of progress, as text or as JSON."""
        if self.log_json:
            self._log("info", **fields)
        else:
            self._err.print(text, soft_wrap=True)


@contextlib.contextmanager
def loading(arguments: Sequence[str]) -> Iterator[None]:
    """Show on a terminal that a command line with a command is being prepared; it is gone afterwards.

    This does not load rich, which would take longer than what it announces.
    """
    log_json, dumb = os.environ.get(LOG_FORMAT) == "json", os.environ.get("TERM") == "dumb"
    asked = bool(arguments) and not {"-q", "--quiet", "--help", "--version"} & {*arguments}
    if log_json or dumb or not asked or not sys.stderr.isatty():
        yield
        return
    sys.stderr.write("  loading")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def as_json(value: Any) -> str:
    """JSON for stdout, in ASCII if stdout is not UTF-8."""
    return json.dumps(value, indent=2, ensure_ascii="utf" not in (sys.stdout.encoding or "").lower())


def write(text: str) -> bool:
    """Write to stdout and flush; return False if the reader is gone, after which output is discarded."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise the rest of the buffer would raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def accept_any_character() -> None:
    """Let stdout and stderr accept every character; those outside their encoding are written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _write_crash_log(error: Exception) -> str | None:
    """Write version, command and traceback into a temporary file; return its path, or None if this fails too."""
    try:
        lines = [
            f"moec {moec.__version__}, Python {platform.python_version()}, {platform.platform()}",
            f"command: {' '.join(sys.argv)}",
            "",
            *traceback.format_exception(error),
        ]
        descriptor, path = tempfile.mkstemp(prefix="moec-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("\n".join(lines))
    except (OSError, MemoryError):
        return None
    return path
