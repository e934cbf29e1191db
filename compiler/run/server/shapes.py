"""Answers in the forms of OpenAI's two endpoints."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moec.compiler.run.session import Statistics


@dataclass(frozen=True)
class Shape:
    """How an endpoint tells an answer.

    Attributes:
        prefix: Of identifiers.
        whole: Name of the object of a whole answer.
        chunk: Name of the object of a piece of a stream.
        is_chat: Whether text is a message with a role.
    """

    prefix: str
    whole: str
    chunk: str
    is_chat: bool

    def begin(self, model: str) -> Telling:
        """A new answer of `model`."""
        return Telling(self, model, f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()))


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", is_chat=True)
COMPLETION = Shape("cmpl", "text_completion", "text_completion", is_chat=False)


@dataclass(frozen=True)
class Telling:
    """One answer: its objects share a name and a time."""

    shape: Shape
    model: str
    name: str
    created: int

    def whole(self, text: str, counts: Statistics) -> dict[str, Any]:
        """The answer in one object."""
        told = {"message": {"role": "assistant", "content": text}} if self.shape.is_chat else {"text": text}
        choice = self._choice(told, counts.finish)
        return {**self._object(self.shape.whole, [choice]), "usage": _usage(counts)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """What comes before the first piece of a stream."""
        if self.shape.is_chat:
            yield self._chunk({"delta": {"role": "assistant", "content": ""}})

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of a stream."""
        return self._chunk({"delta": {"content": text}} if self.shape.is_chat else {"text": text})

    def closing(self, counts: Statistics) -> dict[str, Any]:
        """The end of a stream, with its reason."""
        return self._chunk({"delta": {}} if self.shape.is_chat else {"text": ""}, counts.finish)

    def usage(self, counts: Statistics) -> dict[str, Any]:
        """The counts after a stream."""
        return {**self._object(self.shape.chunk, []), "usage": _usage(counts)}

    def _chunk(self, told: dict[str, Any], finish: str = "") -> dict[str, Any]:
        return self._object(self.shape.chunk, [self._choice(told, finish)])

    def _choice(self, told: dict[str, Any], finish: str) -> dict[str, Any]:
        return {"index": 0, **told, "logprobs": None, "finish_reason": finish or None}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _usage(counts: Statistics) -> dict[str, int]:
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.new_tokens,
        "total_tokens": counts.prompt_tokens + counts.new_tokens,
    }
