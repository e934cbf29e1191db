"""sha256 of bytes, texts, JSON values and files, as the hex digests that `sha256sum` prints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 24
"""Bytes read from a file at a time."""


def sha256_of_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Digest of the concatenated chunks."""
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """Digest of some bytes."""
    return sha256_of_chunks([data])


def sha256_of_text(text: str) -> str:
    """Digest of a text in UTF-8."""
    return sha256_of_bytes(text.encode())


def sha256_of_json(value: Any) -> str:
    """Digest of a value that JSON can hold, independent of the order of its keys."""
    return sha256_of_text(json.dumps(value, sort_keys=True))


def sha256_of_file(path: Path, start: int = 0, stop: int | None = None) -> str:
    """Digest of a file, which may be larger than the memory, or of its bytes from `start` to `stop`.

    Raises:
        OSError: It cannot be read.
    """
    return sha256_of_chunks(_pieces(path, start, stop))


def _pieces(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(CHUNK_BYTES if stop is None else min(CHUNK_BYTES, stop - file.tell())):
            yield data
