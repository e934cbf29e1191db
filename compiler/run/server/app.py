"""The web application: routes of OpenAI's API, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from moec.compiler.common.errors import UsageError
from moec.compiler.run.generate import Generator
from moec.compiler.run.server.errors import ApiError, to_api_error
from moec.compiler.run.server.metrics import CONTENT_TYPE, Metrics
from moec.compiler.run.server.requests import (
    COMPLETION_TOKENS,
    Asked,
    ChatRequest,
    Common,
    CompletionRequest,
    parse,
)
from moec.compiler.run.server.responses import CHAT, COMPLETION, ResponseFormat
from moec.compiler.run.server.scheduler import Batching, Job, Scheduler, Ticket, TooManyRequestsError
from moec.targets.runners import CountingRunner

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = ("/health",)
"""Paths that need no key."""
TICKETS = "moec.tickets"
"""Key in the scope of a request for its jobs, which are cancelled when the request ends."""
BUDGET = "routing_budget"


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        model: Name of the model in requests.
        api_key: Bearer token that requests must have; None for none.
        hosts: Host names, without ports, under which the server answers; None for any. This keeps out a web page whose
            own host name resolves to this machine (DNS rebinding).
        parallel: Largest number of requests that are answered together.
        max_requests: Largest number of running and waiting requests.
        batching: When the tokens of several answers are computed in one step.
        max_tokens: Largest number of new tokens per request.
        max_bytes: Largest size of a request body in bytes.
    """

    model: str
    api_key: str | None = None
    hosts: frozenset[str] | None = None
    parallel: int = 8
    max_requests: int = 64
    batching: Batching = Batching.AUTO
    max_tokens: int = 4096
    max_bytes: int = 4 * 2**20


class _Middleware:
    """Middleware: checks host and key, counts responses, and cancels the jobs of a request when it ends.

    Args:
        app: The wrapped application.
        settings: Settings of the server.
        metrics: Counts the responses.
    """

    def __init__(self, app: Any, settings: Settings, metrics: Metrics) -> None:
        self._app, self._metrics, self._hosts = app, metrics, settings.hosts
        self._expected = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tickets: list[Ticket] = []
        scope[TICKETS] = tickets

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.responded(getattr(route, "path", "other"), message["status"])
            await send(message)

        try:
            if error := self._refusal(scope):
                await JSONResponse(error.body, error.status)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._hosts is not None and _host(headers.get(b"host", b"")) not in self._hosts:
            return ApiError(403, "the server does not answer under this host name (Host)", code="invalid_host")
        if self._expected is None or scope["path"] in OPEN:
            return None
        if hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            return None
        return ApiError(401, "the API key is missing or wrong (Authorization: Bearer KEY)", code="invalid_api_key")


def _host(header: bytes) -> str:
    """The host name in a Host header, without the port; empty if the header is not valid."""
    try:
        return urlsplit(f"//{header.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


class _Service:
    """The handlers of the routes."""

    def __init__(self, generator: Generator, settings: Settings) -> None:
        self.generator, self.settings = generator, settings
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            generator,
            parallel=settings.parallel,
            max_requests=settings.max_requests,
            batching=settings.batching,
            on_end=self.metrics.ended,
        )
        self.metrics.watch(self.scheduler)
        if isinstance(generator.runner, CountingRunner) and generator.runner.expert_tokens:
            self.metrics.count_experts(generator.runner.expert_tokens)
        self._started = int(time.time())

    async def health(self) -> Response:
        """Tell that the server is running."""
        return JSONResponse({"status": "ok"})

    async def prometheus(self) -> Response:
        """Counters and histograms in the text format of Prometheus."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self) -> Response:
        """The list of models, which has one entry."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The model `name`."""
        self._check_model(name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        described = {"id": self.settings.model, "object": "model", "created": self._started, "owned_by": "moec"}
        limit = self.generator.context_length
        return described if limit is None else {**described, "max_model_len": limit}

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        asked = await self._parse(request, ChatRequest)
        turns = [message.turn for message in asked.messages]
        ids = await asyncio.to_thread(self.generator.encode_chat, turns)
        return await self._respond(request, asked, ids, asked.max_completion_tokens or asked.max_tokens, CHAT)

    async def completions(self, request: Request) -> Response:
        """Continue a text or token ids."""
        asked = await self._parse(request, CompletionRequest)
        prompt = asked.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(self.generator.encode, prompt)
        else:
            ids = [index for index in prompt if isinstance(index, int)]
        return await self._respond(request, asked, ids, asked.max_tokens or COMPLETION_TOKENS, COMPLETION)

    async def _parse(self, request: Request, kind: type[Asked]) -> Asked:
        """Read and validate a request.

        Raises:
            ApiError: It is not valid, too large, or for another model.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A page of another site may send other content types without a CORS preflight request.
            raise ApiError(400, "the Content-Type must be application/json", code="invalid_content_type")
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > self.settings.max_bytes:
                raise ApiError(413, f"the body has more than {self.settings.max_bytes} bytes", code="request_too_large")
        asked = parse(b"".join(parts), kind)
        self._check_model(asked.model)
        return asked

    def _check_model(self, name: str) -> None:
        if name != self.settings.model:
            reason = f"there is no model '{name}'; this server has '{self.settings.model}'"
            raise ApiError(404, reason, param="model", code="model_not_found")

    def _job(self, asked: Common, ids: list[int], most: int | None) -> Job:
        """The job for a request.

        Raises:
            ApiError: The request exceeds a limit, or sets an input that the artifact does not have.
        """
        if most is not None and most > self.settings.max_tokens:
            raise ApiError(
                400,
                f"{most} tokens are requested; this server allows at most {self.settings.max_tokens}",
                param="max_tokens",
            )
        limit = self.generator.context_length
        room = self.settings.max_tokens if limit is None else limit - len(ids)
        wanted = min(room, self.settings.max_tokens) if most is None else most
        if room < max(wanted, 1):
            raise ApiError(
                400,
                f"the artifact allows {limit} tokens; the prompt has {len(ids)}"
                + (f", and {most} new ones are requested" if most else ""),
                param="messages" if isinstance(asked, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        if asked.routing_budget is not None and BUDGET not in self.generator.scalar_inputs:
            reason = f"the artifact has no input {BUDGET}; export it with --routing-input"
            raise ApiError(400, reason, param=BUDGET, code="unsupported_parameter")
        self.generator.check(ids, wanted)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**64
        return Job(
            prompt=tuple(ids),
            max_new_tokens=wanted,
            sampling=self.generator.sampling(seed=seed, **asked.sampling),
            stop=asked.stops,
            inputs={} if asked.routing_budget is None else {BUDGET: asked.routing_budget},
        )

    async def _respond(
        self, request: Request, asked: Common, ids: list[int], most: int | None, shape: ResponseFormat
    ) -> Response:
        ticket, events = self._submit(request, self._job(asked, ids, most))
        telling = shape.begin(self.settings.model)
        if not asked.stream:
            text = await self._whole(request, events)
            return JSONResponse(telling.whole(text, ticket.statistics))
        first = await events.get()  # an error at the start gives an error status instead of a stream
        if isinstance(first, Exception):
            raise to_api_error(first)

        async def lines() -> AsyncIterator[bytes]:
            for chunk in telling.opening():
                yield _event(chunk)
            event: str | Exception | None = first
            while isinstance(event, str):
                yield _event(telling.piece(event))
                event = await events.get()
            if isinstance(event, Exception):
                yield _event(to_api_error(event).body)
                return
            yield _event(telling.closing(ticket.statistics))
            if asked.stream_options and asked.stream_options.include_usage:
                yield _event(telling.usage(ticket.statistics))
            yield b"data: [DONE]\n\n"

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    def _submit(self, request: Request, job: Job) -> tuple[Ticket, asyncio.Queue[str | Exception | None]]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[str | Exception | None]()
        try:
            ticket = self.scheduler.submit(job, lambda event: _hand_over(loop, events, event))
        except TooManyRequestsError:
            reason = f"{self.settings.max_requests} requests are running or waiting; try again later"
            raise ApiError(429, reason, code="rate_limit_exceeded") from None
        request.scope[TICKETS].append(ticket)
        return ticket, events

    async def _whole(self, request: Request, events: asyncio.Queue[str | Exception | None]) -> str:
        """Collect the whole text.

        Raises:
            ApiError: The client disconnected, or the job failed.
        """
        collecting = asyncio.ensure_future(_collect(events))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ApiError(499, "the client disconnected", code="cancelled")
            return collecting.result()
        finally:
            collecting.cancel()
            leaving.cancel()


def _hand_over(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[str | Exception | None], event: str | Exception | None
) -> None:
    """Pass an event from the scheduler's thread to the server's event loop.

    Raises:
        RuntimeError: The event loop is closed.
    """
    loop.call_soon_threadsafe(events.put_nowait, event)


async def _collect(events: asyncio.Queue[str | Exception | None]) -> str:
    parts = []
    while isinstance(event := await events.get(), str):
        parts.append(event)
    if isinstance(event, Exception):
        raise to_api_error(event)
    return "".join(parts)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def make_app(generator: Generator, settings: Settings) -> FastAPI:
    """Make the application that serves `generator`; its lifespan starts and stops the scheduler.

    Raises:
        ArtifactError: The artifact has no tokenizer, or it is damaged.
    """
    _ = generator.tokenizer  # opened now, so that an error is reported at the start
    service = _Service(generator, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.stop)

    app = FastAPI(title="moec", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_api_route("/health", service.health)
    app.add_api_route("/metrics", service.prometheus)
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/v1/models/{name:path}", service.model)
    for path, handler, kind in (
        ("/v1/chat/completions", service.chat_completions, ChatRequest),
        ("/v1/completions", service.completions, CompletionRequest),
    ):
        body = {"content": {"application/json": {"schema": kind.model_json_schema()}}, "required": True}
        app.add_api_route(path, handler, methods=["POST"], openapi_extra={"requestBody": body})
    for raised in (ApiError, UsageError, HTTPException, 404, 405):
        app.add_exception_handler(raised, _error_response)
    app.add_exception_handler(Exception, _error_response)
    app.add_middleware(_Middleware, settings=settings, metrics=service.metrics)
    return app


async def _error_response(_request: Request, error: Exception) -> Response:
    """The response for an exception: OpenAI's error object."""
    if isinstance(error, HTTPException) or hasattr(error, "status_code"):
        error = ApiError(error.status_code, str(getattr(error, "detail", error)))
    found = to_api_error(error)
    headers = {"Retry-After": "1"} if found.status == 429 else None
    return JSONResponse(found.body, found.status, headers)
