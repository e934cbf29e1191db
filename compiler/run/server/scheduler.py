"""Runs several answers at once: each step gives each of them a token."""

from __future__ import annotations

import threading
import time
from collections import abc, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from moec.compiler.common.choices import Choice
from moec.compiler.run.batch import Batches
from moec.compiler.run.generate import Generator
from moec.compiler.run.session import Answer, Statistics
from moec.compiler.text.sampling import Sampling
from moec.targets.runners import ForkableRunner, can_batch, limits_of


class Batching(Choice):
    """When the tokens of a round are computed in one step, if the runner can."""

    AUTO = "auto", "unless float16, or activations rounded to int8, make another text likely"
    ALWAYS = "always", "wherever the runner can"
    NEVER = "never", "each request as if it were alone"


@dataclass(frozen=True)
class Job:
    """A request for an answer.

    Attributes:
        prompt: Token ids.
        max_new_tokens: Largest number of new tokens.
        sampling: Sampling settings.
        stop: Strings before which the answer ends.
        inputs: Values of scalar inputs of the artifact, such as {"routing_budget": 0.7}.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    inputs: Mapping[str, float] = field(default_factory=dict)


Deliver = Callable[["str | Exception | None"], None]
"""Called in the scheduler's thread with each piece of text, then with None, or with the exception that ended it."""


class Ticket:
    """A submitted job.

    Attributes:
        job: The job.
        statistics: Counts so far.
        submitted: Time of submission (`time.perf_counter`).
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
        self.answer: Answer | None = None

    def cancel(self) -> None:
        """Cancel the job; it ends after the current step."""
        self.cancelled = True

    def deliver(self, event: str | Exception | None) -> None:
        """Pass an event to the receiver; if its event loop is closed, cancel the job."""
        try:
            self._deliver(event)
        except RuntimeError:  # the event loop is closed
            self.cancel()


class TooManyRequestsError(Exception):
    """The number of running and waiting requests has reached its limit."""


class Scheduler:
    """Runs jobs in turns in its own thread; a turn is one token or one piece of a prompt.

    If the runner can (`can_batch`), the tokens of a round are computed in one step, see `Batching`; otherwise in one
    after the other.
    When all places are taken, further jobs wait in order of arrival.

    Args:
        generator: The artifact.
        parallel: Largest number of answers in a round; 1 if the runner cannot fork.
        max_requests: Largest number of running and waiting jobs.
        batching: When the tokens of a round are computed in one step.
        on_end: Called with each ticket when its job ends.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        parallel: int,
        max_requests: int,
        batching: Batching = Batching.AUTO,
        on_end: Callable[[Ticket], None] = lambda _ticket: None,
    ) -> None:
        self._generator = generator
        self.parallel = parallel if isinstance(generator.runner, ForkableRunner) else 1
        limits = limits_of(generator.runner)
        self._longest_shared = limits.max_shared_length
        wanted = batching is Batching.ALWAYS or (batching is Batching.AUTO and not generator.rounds_coarsely)
        self._batches = Batches(generator) if wanted and can_batch(generator.runner) else None
        if self._batches and limits.max_batch:
            self.parallel = min(self.parallel, limits.max_batch)
        self._most, self._on_end = max_requests, on_end
        self._waiting: deque[Ticket] = deque()
        self._active: list[Ticket] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="moec-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel all jobs and wait for the current step."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def active(self) -> int:
        """Number of jobs that take turns now."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """Submit a job.

        Raises:
            TooManyRequestsError: The limit of running and waiting jobs is reached, or the scheduler was stopped.
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
            if self._batches:
                self._decode(self._batches)
            for ticket in tuple(self._active):
                self._step(ticket)
        if self._batches:
            self._batches.keep(())
        with self._changed:
            left = (*self._active, *self._waiting)
            self._waiting.clear()
        for ticket in left:
            self._end(ticket, "cancelled", None)

    def _admit(self) -> list[Ticket]:
        """Wait for work, start waiting jobs in free places, and return the jobs that were cancelled while waiting."""
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
            ticket.statistics, ticket.answer = answer.statistics, answer
            yield from answer.pieces(self._generator.tokenizer, job.stop)

    def _decode(self, batches: Batches) -> None:
        """Compute the next logits of all answers that wait for them."""
        groups: dict[Hashable, list[tuple[Ticket, Answer, int]]] = {}
        for ticket in self._active:
            answer = ticket.answer
            if answer is None or answer.next_token is None or ticket.cancelled:
                continue
            if self._longest_shared is not None and len(answer.session.tokens) >= self._longest_shared:
                answer.session.leave_batch()
                continue
            same = tuple(sorted(ticket.job.inputs.items()))
            groups.setdefault(same, []).append((ticket, answer, answer.next_token))
        batches.keep(groups)
        for key, members in groups.items():
            start, inputs = time.perf_counter(), members[0][0].job.inputs
            try:
                sessions = [answer.session for _, answer, _ in members]
                batches.decode(key, inputs, sessions, [token for _, _, token in members])
            except Exception as error:  # noqa: BLE001 - the receivers get the error, and other jobs continue
                for ticket, _, _ in members:
                    self._end(ticket, "error", error)
            seconds = time.perf_counter() - start
            for ticket, _, _ in members:
                ticket.statistics.decode_seconds += seconds

    def _step(self, ticket: Ticket) -> None:
        """Run one step of a job, or end it."""
        if ticket.cancelled:
            self._end(ticket, "cancelled", None)
            return
        if ticket.pieces is None:
            ticket.pieces = self._pieces(ticket)
        before = ticket.statistics.new_tokens
        try:
            piece = next(ticket.pieces, None)
        except Exception as error:  # noqa: BLE001 - the receiver gets the error, and other jobs continue
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
            ticket.pieces.close()  # releases the runner
        with self._changed:
            if ticket in self._active:
                self._active.remove(ticket)
        ticket.outcome = outcome
        self._on_end(ticket)
        ticket.deliver(event)
