"""`moec serve`: an artifact behind OpenAI's HTTP API."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import socket
from typing import Annotated

import typer

from moec.compiler.commands.console import Console
from moec.compiler.commands.options import ArtifactDirectory, DebugOutput, Running
from moec.compiler.common.errors import MissingExtraError, UsageError
from moec.compiler.common.validation import unknown

MODULES = ("fastapi", "uvicorn", "prometheus_client")
"""Modules that the extra `serve` installs."""
INSTALL = "pip install 'moec[serve]'"


def serve(
    running: Running,
    console: Annotated[Console, DebugOutput],
    directory: ArtifactDirectory,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="MOEC_API_KEY", help="Bearer token that requests must have.")
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Allow requests without a key on an address that others can reach.")
    ] = False,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model in requests. (default: the directory's name)")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Largest number of requests that are answered together.")] = 8,
    batch: Annotated[
        str,
        typer.Option(
            metavar="auto|always|never",
            help="When one step computes the tokens of several answers (docs/run.md).",
        ),
    ] = "auto",
    max_requests: Annotated[int, typer.Option(min=1, help="Largest number of running and waiting requests.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens per request.")] = 4096,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest size of a request in bytes.")] = 4 * 2**20,
) -> int:
    """Serve a model by OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics."""
    _check_extra()
    _check_reach(host, api_key, no_key)
    import uvicorn

    from moec.compiler.run.server.app import Settings, make_app
    from moec.compiler.run.server.scheduler import Batching

    if batch not in tuple(Batching):
        raise unknown(batch, tuple(Batching), "unknown value of --batch", "the values")
    batching = next(member for member in Batching if member == batch)

    generator = running.generator(directory, console)
    settings = Settings(
        model=model_name or directory.expanduser().resolve().name,
        api_key=api_key,
        hosts=frozenset({"localhost", "127.0.0.1", "::1", host}) if _is_loopback(host) and not api_key else None,
        parallel=parallel,
        max_requests=max_requests,
        batching=batching,
        max_tokens=max_tokens,
        max_bytes=max_bytes,
    )
    app = make_app(generator, settings)
    with _listen(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        console.note(f"'{settings.model}' at http://{address}:{listener.getsockname()[1]}/v1; Ctrl-C ends")
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
        with contextlib.suppress(KeyboardInterrupt):  # may be raised again after everything was closed
            uvicorn.Server(config).run(sockets=[listener])
        console.note("ended")
    return 0


def missing_modules() -> list[str]:
    """The modules of the extra `serve` that are not installed."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def _check_extra() -> None:
    """Check that the extra `serve` is installed.

    Raises:
        MissingExtraError: A module is missing.
    """
    if missing := missing_modules():
        raise MissingExtraError(f"moec serve needs {', '.join(missing)}, not installed here", hint=INSTALL)


def _check_reach(host: str, api_key: str | None, no_key: bool) -> None:
    """Refuse to listen on an address that others can reach without a key.

    Raises:
        UsageError: The key is empty, or missing on such an address.
    """
    if api_key == "":
        raise UsageError("the API key is empty", hint="give a text with --api-key or MOEC_API_KEY")
    if not (_is_loopback(host) or api_key or no_key):
        raise UsageError(
            f"--host {host}: others can reach this address, and there is no API key",
            hint="set MOEC_API_KEY (or --api-key), or give --no-key",
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address.

    Raises:
        UsageError: The address or port cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error}", hint="give another --port or --host"
        ) from error
    return listener
