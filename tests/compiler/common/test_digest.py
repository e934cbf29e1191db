"""Digests are those of sha256sum, whatever they are taken of."""

import hashlib
from pathlib import Path

import pytest

from moec.compiler.common import digest

DATA = bytes(range(256)) * 3
WANTED = hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("chunk", [1, 100, 768, 1000])
def test_a_file_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(digest, "CHUNK_BYTES", chunk)
    path = tmp_path / "file"
    path.write_bytes(b"before" + DATA + b"behind")
    assert digest.sha256_of_file(path, 6, 6 + len(DATA)) == WANTED
    path.write_bytes(DATA)
    assert digest.sha256_of_file(path) == WANTED
    assert digest.sha256_of_file(path, 5, 5) == hashlib.sha256(b"").hexdigest()


def test_bytes_text_and_json() -> None:
    assert digest.sha256_of_bytes(DATA) == digest.sha256_of_chunks([DATA[:7], memoryview(DATA)[7:]]) == WANTED
    assert digest.sha256_of_text("é") == hashlib.sha256("é".encode()).hexdigest()
    assert digest.sha256_of_json({"b": 1, "a": "é"}) == digest.sha256_of_json({"a": "é", "b": 1})
    assert digest.sha256_of_json({"a": 1}) == hashlib.sha256(b'{"a": 1}').hexdigest()
