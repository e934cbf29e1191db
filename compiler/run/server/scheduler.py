"""Several answers at once: each has a sequence of its own, and they take turns, token by token."""

from __future__ import annotations

import threading
import time
from collections import abc, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moec.compiler.run.generate import Generator
from moec.compiler.run.session import Statistics
from moec.compiler.text.sampling import Sampling
from moec.targets.base import ForkableRunner


@dataclass(frozen=True)
class Job:
    """What is asked.

    Attributes:
        prompt: Token ids.
        max_new_tokens: At most so many new ones.
        sampling: How they are chosen.
        stop: Strings before which the answer ends.
        inputs: Values of scalar inputs of the artifact, such as {"routing_budget": 0.7}.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    inputs: Mapping[str, float] = field(default_factory=dict)


Deliver = Callable[["str | Exception | None"], None]
"""Takes a piece of text, then None at the end or the exception that ended it. Called from the scheduler's thread."""


class Ticket:
    """A job under way.

    Attributes:
        job: What was asked.
        statistics: Counts, which grow.
        submitted: Time (`time.perf_counter`) when it was asked.
        first: Time of the first token, or 0.
        last: Time of the last token so far, or 0.
        outcome: "stop", "length", "cancelled" or "error" at the end, empty before.
    """

    def __init__(self, job: Job, deliver: Deliver) -> None:
        self.job, self._deliver = job, deliver
        self.statistics = Statistics(prompt_tokens=len(job.prompt))
        self.submitted = time.perf_counter()
        self.first = self.last = 0.0
        self.outcome = ""
        self.cancelled = False
        self.pieces: abc.Generator[str, None, None] | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more: its place is free after the step that is under way."""
        self.cancelled = True

    def deliver(self, event: str | Exception | None) -> None:
        """Hand an event to whoever asked; if he is gone, the job is cancelled."""
        try:
            self._deliver(event)
        except RuntimeError:  # his event loop is closed
            self.cancel()


class TooManyRequestsError(Exception):
    """As many requests as are allowed are under way or wait."""


class Scheduler:
    """Runs jobs in a thread of its own, each step of one token or one piece of a prompt, in turns.

    Every answer is decoded by itself; the runtime uses all of its threads for one step. A job that comes when all
    places are taken waits in line.

    Args:
        generator: The artifact.
        parallel: Answers that take turns at most; one where the runner cannot fork.
        max_requests: Jobs at most, those that wait among them.
        on_end: Called with each ticket at its end.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        parallel: int,
        max_requests: int,
        on_end: Callable[[Ticket], None] = lambda _ticket: None,
    ) -> None:
        self._generator = generator
        self.parallel = parallel if isinstance(generator.runner, ForkableRunner) else 1
        self._most, self._on_end = max_requests, on_end
        self._waiting: deque[Ticket] = deque()
        self._active: list[Ticket] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="moec-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel all jobs and wait for the step that is under way."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def active(self) -> int:
        """Jobs that take turns now."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a place."""
        return len(self._waiting)

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """Take a job.

        Raises:
            TooManyRequestsError: There are too many.
        """
        ticket = Ticket(job, deliver)
        with self._changed:
            if self._stopped or len(self._active) + len(self._waiting) >= self._most:
                raise TooManyRequestsError
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _run(self) -> None:
        while not self._stopped:
            for ticket in self._admit():
                self._end(ticket, "cancelled", None)
            for ticket in tuple(self._active):
                self._step(ticket)
        with self._changed:
            left = (*self._active, *self._waiting)
            self._waiting.clear()
        for ticket in left:
            self._end(ticket, "cancelled", None)

    def _admit(self) -> list[Ticket]:
        """Wait for work and give free places to those who came first; returns those who went away while they waited."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._active or self._waiting)
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            while self._waiting and len(self._active) < self.parallel:
                self._active.append(self._waiting.popleft())
            return gone

    def _pieces(self, ticket: Ticket) -> abc.Generator[str, None, None]:
        job = ticket.job
        with self._generator.session(job.inputs) as session:
            answer = self._generator.answer(
                session, job.prompt, max_new_tokens=job.max_new_tokens, sampling=job.sampling, stop=job.stop
            )
            ticket.statistics = answer.statistics
            yield from answer.pieces(self._generator.tokenizer, job.stop)

    def _step(self, ticket: Ticket) -> None:
        """One token, or the end."""
        if ticket.cancelled:
            self._end(ticket, "cancelled", None)
            return
        if ticket.pieces is None:
            ticket.pieces = self._pieces(ticket)
        before = ticket.statistics.new_tokens
        try:
            piece = next(ticket.pieces, None)
        except Exception as error:  # noqa: BLE001 - whoever asked is told, and the others go on
            self._end(ticket, "error", error)
            return
        if ticket.statistics.new_tokens > before:
            ticket.last = time.perf_counter()
            ticket.first = ticket.first or ticket.last
        if piece:
            ticket.deliver(piece)
        if piece is None:
            self._end(ticket, ticket.statistics.finish, None)

    def _end(self, ticket: Ticket, outcome: str, event: Exception | None) -> None:
        if ticket.pieces is not None:
            ticket.pieces.close()  # gives the runner back
        with self._changed:
            if ticket in self._active:
                self._active.remove(ticket)
        ticket.outcome = outcome
        self._on_end(ticket)
        ticket.deliver(event)
