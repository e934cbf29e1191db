"""Figures of the server in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from moec.compiler.run.server.scheduler import Scheduler, Ticket

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._responses = Counter(
            "moec_http_responses", "Responses by path and status.", ["path", "status"], registry=own
        )
        self._ended = Counter("moec_generations", "Answers by how they ended.", ["outcome"], registry=own)
        self._prompt = Counter("moec_prompt_tokens", "Tokens of prompts.", registry=own)
        self._new = Counter("moec_generated_tokens", "Tokens of answers.", registry=own)
        self._whole = Histogram(
            "moec_request_seconds", "From a request to its last token.", buckets=_SECONDS, registry=own
        )
        self._first = Histogram(
            "moec_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=own
        )
        self._token = Histogram(
            "moec_token_seconds",
            "From one token of an answer to the next, mean of each answer.",
            buckets=_TOKEN_SECONDS,
            registry=own,
        )
        for outcome in ("stop", "length", "cancelled", "error"):
            self._ended.labels(outcome)

    def watch(self, scheduler: Scheduler) -> None:
        """Tell how many requests of `scheduler` are under way and wait."""
        active = Gauge("moec_requests_active", "Requests that are being answered.", registry=self._registry)
        waiting = Gauge("moec_requests_waiting", "Requests that wait for a place.", registry=self._registry)
        active.set_function(lambda: scheduler.active)
        waiting.set_function(lambda: scheduler.waiting)

    def responded(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(path, str(status)).inc()

    def ended(self, ticket: Ticket) -> None:
        """Count a job."""
        counts = ticket.statistics
        self._ended.labels(ticket.outcome).inc()
        if not ticket.first:
            return
        self._prompt.inc(counts.prompt_tokens)
        self._new.inc(counts.new_tokens)
        self._first.observe(ticket.first - ticket.submitted)
        self._whole.observe(ticket.last - ticket.submitted)
        if counts.new_tokens > 1:
            self._token.observe((ticket.last - ticket.first) / (counts.new_tokens - 1))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        told: bytes = generate_latest(self._registry)
        return told
