"""The tokenizer of a checkpoint or an artifact, and decoding token by token. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.common.errors import ArtifactError, CheckpointError, MoecError, first_line
from moec.compiler.common.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
_UNFINISHED = "\ufffd"
"""Replacement character of a decoder for bytes that are not, or not yet, a character."""
_LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8, and so the largest number of tokens of one incomplete character."""


def open_tokenizer(directory: Path, error: type[ArtifactError | CheckpointError] = CheckpointError) -> Tokenizer:
    """Open `tokenizer.json`.

    Padding and truncation in the file are left over from training. moec ignores them when it encodes a prompt, as
    transformers does.

    Args:
        directory: The directory of the file.
        error: Class of the exception to raise: `ArtifactError` for an artifact.

    Raises:
        CheckpointError: The file is missing or damaged (or `ArtifactError`, as given by `error`).
    """
    from tokenizers import Tokenizer

    path = directory / FILE
    if not path.is_file():
        raise error(
            f"{directory}: it has no {FILE}, which is needed to encode and decode text",
            hint="save the fast tokenizer with the checkpoint (AutoTokenizer...save_pretrained)",
        )
    with _told(error, f"{path}: damaged"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: Tokenizer,
    text: str,
    error: type[ArtifactError | CheckpointError] = CheckpointError,
    *,
    special: bool = True,
) -> list[int]:
    """Token ids of `text`.

    Args:
        tokenizer: From `open_tokenizer`.
        text: The text.
        error: Class of the exception to raise: `ArtifactError` for an artifact.
        special: Whether to add the special tokens that the tokenizer adds to a text.

    Raises:
        CheckpointError: The tokenizer cannot encode it, such as one whose vocabulary lacks its own token for unknown
            words (or `ArtifactError`, as given by `error`).
    """
    with _told(error, f"{FILE} cannot encode the text"):
        return list(tokenizer.encode(text, add_special_tokens=special).ids)


@contextlib.contextmanager
def _told(error: type[ArtifactError | CheckpointError], what: str) -> Iterator[None]:
    """Raise `error` in place of what tokenizers raises: bare `Exception`, and where Rust panics, no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MoecError):
        raise
    except BaseException as cause:
        raise error(f"{what}: {first_line(cause)}", hint="copy or download the file again") from cause


def make_loadable(directory: Path) -> None:
    """Replace the tokenizer class in tokenizer_config.json by a name that every release of transformers knows.

    transformers 5 saves `TokenizersBackend` for every tokenizer without a class of its own, and release 4 cannot load
    it. `PreTrainedTokenizerFast` is the same class under a name that both releases know.
    """
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path, CheckpointError, hint="download the file again")
    if config.get("tokenizer_class") == "TokenizersBackend":
        text = json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


class TextStream:
    """Decodes tokens one by one; the pieces joined are the text of all tokens.

    A token is decoded together with earlier ones, since decoders drop spaces at the start of a text. Bytes of an
    incomplete character are held back until it is complete, or until they cannot form a character. (`DecodeStream` of
    tokenizers raises for bytes that never form a character, and drops held-back bytes at the end.)

    Args:
        tokenizer: Decodes the tokens.
        prompt: The tokens before the first decoded one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A few tokens suffice as context for the first space, and for a prompt that ends within a character.
        self._ids = list(prompt)[-2 * _LONGEST_CHARACTER :]
        self._done = len(self._ids)
        self._start = 0

    def add(self, token: int) -> str:
        """The text that `token` completes; empty if its character is not complete yet."""
        self._ids.append(token)
        waiting = len(self._ids) - self._done
        finished = (stop for stop in range(len(self._ids), self._done, -1) if self._is_finished(stop))
        if (stop := next(finished, None)) is not None:
            return self._take(stop)
        # The first of so many tokens cannot become part of a character any more; later ones can.
        return self._take(self._done + 1) if waiting >= _LONGEST_CHARACTER else ""

    def end(self) -> str:
        """The rest of the text: bytes that no further token completes to a character."""
        return self._take(len(self._ids)) if self._done < len(self._ids) else ""

    def _is_finished(self, stop: int) -> bool:
        text = self._text(stop)
        return bool(text) and not text.endswith(_UNFINISHED)

    def _take(self, stop: int) -> str:
        text = self._text(stop)
        self._start, self._done = self._done, stop
        return text

    def _text(self, stop: int) -> str:
        """Text of the tokens that were not returned yet, up to `stop`."""
        before, after = self._decode(self._ids[self._start : self._done]), self._decode(self._ids[self._start : stop])
        # Earlier bytes may form another character together with new ones; returned text is not changed.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
        return after[sum(1 for _ in same) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
