"""How progress is shown: live bars on a terminal, and lines elsewhere; a step that ends is one line in both.

A step is open from its first call until it is told that it is done. A step that ends also ends every step that was
opened after it, since these are parts of it that stopped early.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.console
    import rich.progress

    from moec.compiler.common.progress import Progress

LOADING = "loading"
_INTERVAL = 5.0
"""Seconds between two lines of a step if there is no terminal."""


@dataclass
class _Step:
    """When a step was opened, and when something was last said of it, in seconds of `time.perf_counter`."""

    opened: float
    told: float


@dataclass
class _Steps:
    """The open steps in the order in which they were opened, and the names of those that ended."""

    open: dict[str, _Step] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def at(self, now: float, name: str, done: int, total: int) -> _Step | None:
        """The step of a call at the time `now`, opened if need be; None if it has ended and the call says so again."""
        if name not in self.open:
            if name in self.ended and _is_done(done, total):
                return None
            self.open[name] = _Step(now, now)
        return self.open[name]

    def end(self, name: str) -> list[str]:
        """End a step; the names of all steps that are no longer open."""
        names = list(self.open)
        gone = names[names.index(name) :]
        for each in gone:
            del self.open[each]
        self.ended.add(name)
        return gone


def lines(tell: Callable[..., None]) -> Progress:
    """A Progress for logs: a line when a step ends, and every few seconds during it.

    Args:
        tell: Called with the text of a line, and its facts as keyword arguments.
    """
    steps = _Steps()

    def update(name: str, done: int, total: int) -> None:
        now = time.perf_counter()
        step = steps.at(now, name, done, total)
        if step is None:
            return
        elapsed = now - step.opened
        if _is_done(done, total):
            steps.end(name)
            tell(f"{name}: {duration(elapsed)}", step=name, done=done, total=total, seconds=elapsed)
        elif done and now - step.told >= _INTERVAL:
            step.told = now
            left = elapsed * (total - done) / done
            text = f"{name}: {done} of {total}, {duration(elapsed)} elapsed, {duration(left)} left"
            facts = {"seconds": elapsed, "rate": done / elapsed, "seconds_left": left}
            tell(text, step=name, done=done, total=total, **facts)

    return update


@contextlib.contextmanager
def bars(console: rich.console.Console) -> Iterator[Progress]:
    """A Progress for a terminal: a bar for each open step, below the lines of those that have ended.

    Something is shown at once, before the first step.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), _count_column(), _time_column())
    steps, tasks = _Steps(), {}
    with Progress(*columns, console=console, transient=True) as shown:
        tasks[LOADING] = shown.add_task(LOADING, total=None)

        def update(name: str, done: int, total: int) -> None:
            if (task := tasks.pop(LOADING, None)) is not None:
                shown.remove_task(task)
            now = time.perf_counter()
            step = steps.at(now, name, done, total)
            if step is None:
                return
            if name not in tasks:
                tasks[name] = shown.add_task(name, total=None)
            if _is_done(done, total):
                for ended in steps.end(name):
                    shown.remove_task(tasks.pop(ended))
                shown.refresh()
                shown.console.print(f"{name}: {duration(now - step.opened)}", style="dim")
            else:
                # A step with a single unit of work has an indeterminate bar.
                shown.update(tasks[name], completed=done, total=total if total > 1 else None)

        yield update


def duration(seconds: float) -> str:
    """A length of time, such as "2.3 s", "4 min 05 s" or "2 h 07 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _is_done(done: int, total: int) -> bool:
    return bool(total) and done >= total


def _count_column() -> rich.progress.ProgressColumn:
    return _column(lambda task: "" if task.total is None else f"{task.completed:.0f} of {task.total:.0f}")


def _time_column() -> rich.progress.ProgressColumn:
    def times(task: rich.progress.Task) -> str:
        elapsed = task.elapsed or 0.0
        text = f"{duration(elapsed)} elapsed"
        if task.total and task.completed:
            text += f", {duration(elapsed * (task.total - task.completed) / task.completed)} left"
        return text

    return _column(times)


def _column(text_of: Callable[[rich.progress.Task], str]) -> rich.progress.ProgressColumn:
    """A column with the text of a task."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Column(ProgressColumn):
        """Renders `text_of`."""

        def render(self, task: Any) -> Text:
            """The text of a task."""
            return Text(text_of(task))

    return Column()
