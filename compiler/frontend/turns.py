"""Functions that take turns, so that what several of them need is made once.

Each function runs in a thread of its own, but only one runs at a time: it runs until it asks for something. When all of
them wait, the request that comes first in their order is met, for all that made it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Request:
    """What a function waits for.

    Attributes:
        key: Equal for requests of the same thing. Smaller keys are met first.
        make: Makes it.
    """

    key: tuple[int, ...]
    make: Callable[[], Tensor]


class _StoppedError(BaseException):
    """Ends a function because another one failed. Code that catches every Exception does not catch it."""


class _Turn(threading.Thread):
    """The thread of one function."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._given: Tensor | None = None
        self.asked: Request | None = None
        self.finished = False
        self.stopping = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self.stopping:
                self.result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self.error = error
        self.finished = True
        self._waits.release()

    def ask(self, request: Request) -> Tensor:
        """Wait until `request` is met; called by the function."""
        self.asked = request
        self._waits.release()
        self._go.acquire()
        if self.stopping:
            raise _StoppedError
        given, self._given = self._given, None
        assert given is not None
        return given

    def resume(self, given: Tensor | None = None) -> None:
        """Let the function run until it asks for something or ends.

        Raises:
            BaseException: What the function raised.
        """
        self._given = given
        self._go.release()
        self._waits.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the function."""
        self.stopping = True
        self._go.release()
        self.join()


def ask(request: Request) -> Tensor:
    """What `request` makes, shared with the other functions of `in_turns`; outside of it, it is made for the caller."""
    thread = threading.current_thread()
    return thread.ask(request) if isinstance(thread, _Turn) else request.make()


def in_turns(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run functions that call `ask`, and return their results.

    Raises:
        BaseException: What the first function that failed raised, or what a request raised. The others are ended.
    """
    with _started(work) as turns:
        for turn in turns:
            turn.resume()
        while waiting := [turn for turn in turns if not turn.finished]:
            first = min((turn.asked for turn in waiting if turn.asked is not None), key=lambda asked: asked.key)
            given = first.make()
            for turn in waiting:
                if turn.asked is not None and turn.asked.key == first.key:
                    turn.resume(given)
            del given  # before the next one is made
        return [turn.result for turn in turns]


@contextlib.contextmanager
def _started(work: Sequence[Callable[[], Any]]) -> Iterator[list[_Turn]]:
    turns = [_Turn(one) for one in work]
    for turn in turns:
        turn.start()
    try:
        yield turns
    finally:
        for turn in turns:
            turn.stop()
