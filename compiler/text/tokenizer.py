"""The tokenizer file of a checkpoint or an artifact, and text that grows token by token. Imports no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.common.errors import ArtifactError, CheckpointError, first_line
from moec.compiler.common.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
_UNFINISHED = "\ufffd"
"""What a decoder puts in place of bytes that are not, or not yet, a character."""
_LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8: no more tokens than that wait for their character to be finished."""


def open_tokenizer(directory: Path, error: type[ArtifactError | CheckpointError] = CheckpointError) -> Tokenizer:
    """Open `tokenizer.json`.

    Padding and truncation that the file switches on are left from training: transformers ignores both when it encodes
    a prompt, and so does moec.

    Args:
        directory: Where the file lies.
        error: What is raised, `ArtifactError` for an artifact.

    Raises:
        CheckpointError: There is no such file, or it is damaged.
    """
    from tokenizers import Tokenizer

    path = directory / FILE
    if not path.is_file():
        raise error(
            f"{directory}: it has no {FILE}, so text can be neither read nor written",
            hint="save the fast tokenizer with the checkpoint (AutoTokenizer...save_pretrained)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as cause:  # tokenizers raises bare Exception
        raise error(f"{path}: damaged: {first_line(cause)}", hint="copy or download the file again") from cause
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def make_loadable(directory: Path) -> None:
    """Name a tokenizer class in tokenizer_config.json that every release of transformers has.

    `TokenizersBackend` is new in transformers 5, which saves it for every tokenizer that needs no class of its own;
    release 4 cannot load it. `PreTrainedTokenizerFast` is the same class under the name that both have.
    """
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path, CheckpointError, hint="download the file again")
    if config.get("tokenizer_class") == "TokenizersBackend":
        text = json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


class TextStream:
    """Turns tokens into text one by one: what was yielded, joined, is the text of all tokens.

    A token is decoded together with those before it, since decoders drop spaces at the start of a text. Bytes that are
    not yet a character are held back until they are one, or until they cannot become one. (`DecodeStream` of tokenizers
    raises where bytes never form a character, and it drops what is held back at the end.)

    Args:
        tokenizer: Decodes the tokens.
        prompt: The tokens before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A few tokens are context enough for the first space; a prompt that ends within a character needs its bytes.
        self._ids = list(prompt)[-2 * _LONGEST_CHARACTER :]
        self._done = len(self._ids)
        self._start = 0

    def add(self, token: int) -> str:
        """The text that `token` finishes; empty where its character is not finished yet."""
        self._ids.append(token)
        waiting = len(self._ids) - self._done
        finished = (stop for stop in range(len(self._ids), self._done, -1) if self._is_finished(stop))
        if (stop := next(finished, None)) is not None:
            return self._take(stop)
        # The first of so many bytes cannot become a character any more; those behind it still can.
        return self._take(self._done + 1) if waiting >= _LONGEST_CHARACTER else ""

    def end(self) -> str:
        """What is left of the text: characters that no further token finishes."""
        return self._take(len(self._ids)) if self._done < len(self._ids) else ""

    def _is_finished(self, stop: int) -> bool:
        text = self._text(stop)
        return bool(text) and not text.endswith(_UNFINISHED)

    def _take(self, stop: int) -> str:
        text = self._text(stop)
        self._start, self._done = self._done, stop
        return text

    def _text(self, stop: int) -> str:
        """Text of the tokens that were not yielded yet, up to `stop`."""
        before, after = self._decode(self._ids[self._start : self._done]), self._decode(self._ids[self._start : stop])
        # Where bytes before them join the new ones to another character, what was yielded stays.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
        return after[sum(1 for _ in same) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
