"""A static HTTP server for tests, which can break and damage what it sends."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css",
         ".json": "application/json", ".wasm": "application/wasm"}  # fmt: skip
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


@dataclass
class StaticServer:
    """Serves a folder.

    Attributes:
        folder: The folder.
        isolated: Whether pages are cross-origin isolated.
        ranges: Whether it answers requests for a range of bytes; if not, it sends whole files.
        breaks: Path -> how many answers of it still break in the middle.
        damages: Path -> how many answers of it still come with a byte changed.
        requests: Path and range of every request, in order.
        sent: Bytes of bodies sent, by path.
    """

    folder: Path
    isolated: bool = True
    ranges: bool = True
    breaks: dict[str, int] = field(default_factory=dict)
    damages: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path.lstrip("/") or "index.html"
        asked = handler.headers.get("Range")
        self.requests.append((path, asked))
        file = self.folder / path
        if not file.resolve().is_relative_to(self.folder.resolve()) or not file.is_file():
            handler.send_error(404)
            return
        data = bytearray(file.read_bytes())
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "") if self.ranges else None
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(data))
        if self.damages.get(path):
            self.damages[path] -= 1
            data[(start + stop) // 2] ^= 1
        handler.send_response(206 if found else 200)
        handler.send_header("Content-Type", TYPES.get(file.suffix, "application/octet-stream"))
        handler.send_header("Content-Length", str(stop - start))
        if found:
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        for name, value in (ISOLATED if self.isolated else {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        body = bytes(data[start:stop])
        if self.breaks.get(path):
            self.breaks[path] -= 1
            # Two thirds of it, and then nothing more.
            body = body[: 2 * len(body) // 3]
            handler.close_connection = True
        self.sent[path] = self.sent.get(path, 0) + len(body)
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(body)


@contextlib.contextmanager
def serving(folder: Path, **settings: bool) -> Iterator[StaticServer]:
    """Serve `folder` on a free port of this machine; `url` ends with a slash."""
    served = StaticServer(folder, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.respond(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
