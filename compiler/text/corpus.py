"""Text for calibration and evaluation: reading, tokenizing and splitting into windows. Imports no torch."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moec.compiler.common.errors import CheckpointError, UsageError
from moec.compiler.common.model_config import read_config, vocabulary_size
from moec.compiler.text.tokenizer import encode, open_tokenizer

_SHIPPED = ("golden_models", "olmoe-tiny", "texts")
CALIBRATION = ("calibration.txt",)
HELD_OUT = ("heldout_python.txt", "heldout_austen.txt", "heldout_kjv.txt")
"""Held-out texts; they share no line and no source with the calibration text."""
SUFFIXES = (".txt", ".md", ".rst", ".text")


def read_text(location: str | Path | None = None, *, shipped: Sequence[str] = CALIBRATION) -> str:
    """Read a file, or all text files of a directory, sorted by name and separated by blank lines.

    Args:
        location: File or directory; None: the texts that come with moec.
        shipped: Which of moec's texts, `CALIBRATION` or `HELD_OUT`.

    Raises:
        CheckpointError: The text is missing, empty or not UTF-8.
    """
    if location is None:
        folder = importlib.resources.files("moec").joinpath(*_SHIPPED)
        return "\n\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in shipped)
    path = Path(location).expanduser()
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.suffix in SUFFIXES and item.is_file())
        if not files:
            raise CheckpointError(
                f"{path}: it has no text file ({', '.join(SUFFIXES)})", hint="give a file, or another directory"
            )
    else:
        files = [path]
    text = "\n\n".join(_read(file) for file in files)
    if not text.strip():
        raise CheckpointError(f"{path}: the text is empty", hint="give a text of at least a few pages")
    return text


def held_out_text(location: str | None) -> str:
    """The held-out text.

    Raises:
        CheckpointError: It is missing, empty or binary.
    """
    return read_text(location, shipped=HELD_OUT)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", hint="give a text file") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from error
    if "\0" in text:
        raise CheckpointError(f"{path}: it is a binary file, not text", hint="give a text file")
    return text


def tokenize(directory: Path, text: str) -> np.ndarray:
    """Token ids of `text` by the tokenizer.json in `directory`, without special tokens: [n] int64.

    Raises:
        CheckpointError: There is no tokenizer.json, it is damaged, or it has tokens outside of the model's vocabulary.
    """
    tokenizer = open_tokenizer(directory)
    # Encoding takes more than linear time in the length of a string, so the text is encoded in pieces.
    pieces = [text[start : start + 20_000] for start in range(0, len(text), 20_000)]
    encoded = [encode(tokenizer, piece, special=False) for piece in pieces]
    ids = np.asarray([index for piece in encoded for index in piece], dtype=np.int64)
    limit = vocabulary_size(read_config(directory / "config.json"))
    if limit is not None and ids.size and ids.max() >= limit:
        raise CheckpointError(
            f"{directory}: tokenizer.json makes the token {ids.max()}, and the model's vocabulary has {limit} entries",
            hint="does the tokenizer belong to this model? Tokens that were added later need embeddings too",
        )
    return ids


def windows(ids: np.ndarray, length: int, count: int | None = None, *, start: int = 0) -> np.ndarray:
    """Split token ids into windows without overlap: [windows, length].

    Args:
        ids: Token ids, [n].
        length: Tokens per window.
        count: Largest number of windows; None: all.
        start: Number of windows to leave out at the beginning.

    Raises:
        CheckpointError: The text is shorter than one window.
        UsageError: `length` is less than 2.
    """
    if length < 2:
        raise UsageError(f"a window of {length} tokens has no token to predict", hint="give 2 or more")
    whole = len(ids) // length - start
    if whole < 1:
        raise CheckpointError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}"
            + (f" after the first {start}" if start else ""),
            hint="give a longer text, or shorter windows",
        )
    taken = whole if count is None else min(whole, count)
    return ids[start * length : (start + taken) * length].reshape(taken, length)


def spread(every: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the windows [n, length], evenly spaced, since parts of a text may have different sources."""
    taken = min(count, len(every))
    return every[np.arange(taken) * len(every) // taken]
