"""Metrics of the server in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from moec.compiler.run.server.scheduler import Scheduler, Ticket

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of the output of `generate_latest`; the library's own constant differs between releases."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class _ExpertTokens(Collector):
    """Tokens of each expert, read when somebody asks.

    Args:
        counts: MoE layer -> tokens of each expert so far.
    """

    def __init__(self, counts: Mapping[int, np.ndarray]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One sample for each layer and expert."""
        labels = ["layer", "expert"]
        family = CounterMetricFamily("moec_expert_tokens", "Tokens by MoE layer and expert.", labels=labels)
        for layer, counts in self._counts.items():
            for expert, count in enumerate(counts.tolist()):
                family.add_metric([str(layer), str(expert)], count)
        yield family


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._responses = Counter(
            "moec_http_responses", "Responses by path and status.", ["path", "status"], registry=own
        )
        self._ended = Counter("moec_generations", "Answers by outcome.", ["outcome"], registry=own)
        self._prompt = Counter("moec_prompt_tokens", "Tokens of prompts.", registry=own)
        self._new = Counter("moec_generated_tokens", "Tokens of answers.", registry=own)
        self._whole = Histogram(
            "moec_request_seconds", "Time from a request to its last token.", buckets=_SECONDS, registry=own
        )
        self._first = Histogram(
            "moec_first_token_seconds", "Time from a request to its first token.", buckets=_SECONDS, registry=own
        )
        self._token = Histogram(
            "moec_token_seconds",
            "Mean time between two tokens of an answer.",
            buckets=_TOKEN_SECONDS,
            registry=own,
        )
        for outcome in ("stop", "length", "cancelled", "error"):
            self._ended.labels(outcome)

    def watch(self, scheduler: Scheduler) -> None:
        """Add gauges of the running and waiting requests of `scheduler`."""
        active = Gauge("moec_requests_active", "Requests that are being answered.", registry=self._registry)
        waiting = Gauge("moec_requests_waiting", "Requests that wait for a place.", registry=self._registry)
        active.set_function(lambda: scheduler.active)
        waiting.set_function(lambda: scheduler.waiting)

    def count_experts(self, counts: Mapping[int, np.ndarray]) -> None:
        """Add the tokens of each expert: MoE layer -> tokens of each expert so far."""
        self._registry.register(_ExpertTokens(counts))

    def responded(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(path, str(status)).inc()

    def ended(self, ticket: Ticket) -> None:
        """Count a job that ended."""
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
        """All metrics in the text format."""
        told: bytes = generate_latest(self._registry)
        return told
