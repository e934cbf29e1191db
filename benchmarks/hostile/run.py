"""Runs one command on one hostile input in a forked process, and measures what it takes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hostile.files import NOTHING, Input, Place

SECONDS = 120
"""A process that runs longer is killed: wall time, since the machine may be busy."""
SLOW, LARGE = 10.0, 1e9
"""Limits of an input: seconds of CPU time, and bytes of memory beyond that of a command that does nothing."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        file: Name of the file.
        damage: What is wrong with it.
        command: The command's first argument.
        code: Exit code, or the negative number of a signal.
        seconds: CPU time.
        memory: Bytes at the peak, beyond those of a command that does nothing.
        said: The first line on stderr that is an error.
        fault: What is wrong with this end; empty if nothing.
    """

    file: str
    damage: str
    command: str
    code: int
    seconds: float
    memory: float
    said: str
    fault: str


def forked(arguments: list[str], log: Path) -> tuple[int, float, int]:
    """Run `moec` with these arguments in a child of this process: exit code, CPU seconds and peak bytes."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _become(arguments, log)
    done, status, usage = os.wait4(child, os.WNOHANG)
    while not done:
        if time.perf_counter() - started > SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
        done, status, usage = os.wait4(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def _become(arguments: list[str], log: Path) -> None:
    """The child: its output goes to a file, and nothing of the parent is run at its end."""
    from moec import cli

    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = cli.dispatch(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def judge(item: Input, valid: Path, work: Path, idle: int) -> Outcome:
    """Put the input into a copy of `valid`, run its command, and say what is wrong with how it ended.

    Args:
        item: The input.
        valid: A directory with valid files; see `hostile.files.Place`.
        work: A directory that is made and removed.
        idle: Peak bytes of a command that does nothing.
    """
    place = Place(work / "place")
    shutil.copytree(valid, place.root, symlinks=True)
    path = item.path(place)
    path.write_bytes(item.content(path.read_bytes()))
    command, log = item.command(place), work / "log"
    code, seconds, peak = forked([*command, "-q"], log)
    text = log.read_text(errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    in_table = "  failed  " in text  # `moec build` tells what is wrong with a cell in its table
    memory = max(0.0, float(peak - idle))
    left = [entry.name for entry in place.root.iterdir() if entry.name.startswith(".")]
    faults = [
        f"killed after {SECONDS} s" if code == -signal.SIGKILL else f"signal {-code}" if code < 0 else "",
        "exit code 70" if code == 70 else "",
        "the valid file is refused" if code and item.damage == NOTHING else "",
        "a traceback" if "Traceback" in text else "",
        f"{seconds:.0f} s" if seconds > SLOW else "",
        f"{memory / 1e9:.1f} GB" if memory > LARGE else "",
        "no message" if code > 0 and not errors and not in_table else "",
        "no hint" if errors and "hint: " not in text else "",
        f"left {', '.join(left)}" if left else "",
    ]
    shutil.rmtree(work)
    said = errors[0] if errors else text.strip().splitlines()[-1] if code and text.strip() else ""
    fault = "; ".join(filter(None, faults))
    return Outcome(item.file, item.damage, command[0], code, seconds, memory, said.replace(str(place.root), ""), fault)
