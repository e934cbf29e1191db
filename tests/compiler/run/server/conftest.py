"""Servers in threads of the tests' own process, at free ports of the loopback address."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

import moec
from moec.compiler.run.generate import Generator
from moec.compiler.run.server.app import Settings, make_app


class Served:
    """A server, and what asks it."""

    def __init__(self, port: int, model: str, api_key: str = "none") -> None:
        self.url, self.model = f"http://127.0.0.1:{port}", model
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def complete(self, prompt: Any, **options: Any) -> Any:
        settings = {"max_tokens": 24, "temperature": 0, **options}
        return self.client.completions.create(model=self.model, prompt=prompt, **settings)

    def chat(self, *turns: str, **options: Any) -> Any:
        messages: Any = [
            {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)
        ]
        settings = {"max_tokens": 24, "temperature": 0, **options}
        return self.client.chat.completions.create(model=self.model, messages=messages, **settings)

    def post(self, path: str, **options: Any) -> Any:
        return self.client._client.post(f"{self.url}{path}", **options)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics, as `name{label,...}`."""
        response = self.client._client.get(f"{self.url}/metrics", headers=self.client.auth_headers)
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return {
            f"{sample.name}{{{','.join(sample.labels.values())}}}" if sample.labels else sample.name: sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    def until(self, name: str, value: float) -> None:
        """Wait until a sample has a value."""
        end = time.monotonic() + 20
        while (found := self.metrics()[name]) != value:
            assert time.monotonic() < end, (name, found)
            time.sleep(0.02)


@contextlib.contextmanager
def running(generator: Generator, **settings: Any) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = make_app(generator, Settings(model="golden", **settings))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        served = Served(listener.getsockname()[1], "golden", settings.get("api_key") or "none")
        try:
            yield served
        finally:
            served.client.close()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def generator(golden_onnx: Path) -> Generator:
    return moec.load(golden_onnx, threads=1)


@pytest.fixture(scope="module")
def served(generator: Generator) -> Iterator[Served]:
    with running(generator) as found:
        yield found


@pytest.fixture
def serve(generator: Generator) -> Iterator[Callable[..., Served]]:
    """A server with settings of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda *own, **settings: stack.enter_context(running(*own or (generator,), **settings))
