"""Responses in the formats of OpenAI's two endpoints."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moec.compiler.run.session import Statistics


@dataclass(frozen=True)
class ResponseFormat:
    """The response format of an endpoint.

    Attributes:
        prefix: Prefix of identifiers.
        whole: Object name of a whole answer.
        chunk: Object name of a chunk of a stream.
        is_chat: Whether the text is a message with a role.
    """

    prefix: str
    whole: str
    chunk: str
    is_chat: bool

    def begin(self, model: str) -> ResponseBuilder:
        """Start a new response of `model`."""
        return ResponseBuilder(self, model, f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()))


CHAT = ResponseFormat("chatcmpl", "chat.completion", "chat.completion.chunk", is_chat=True)
COMPLETION = ResponseFormat("cmpl", "text_completion", "text_completion", is_chat=False)


@dataclass(frozen=True)
class ResponseBuilder:
    """One response, whose objects share an identifier and a time."""

    shape: ResponseFormat
    model: str
    name: str
    created: int

    def whole(self, text: str, counts: Statistics) -> dict[str, Any]:
        """The whole response as one object."""
        told = {"message": {"role": "assistant", "content": text}} if self.shape.is_chat else {"text": text}
        choice = self._choice(told, counts.finish)
        return {**self._object(self.shape.whole, [choice]), "usage": _usage(counts)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks before the text of a stream."""
        if self.shape.is_chat:
            yield self._chunk({"delta": {"role": "assistant", "content": ""}})

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of a stream with text."""
        return self._chunk({"delta": {"content": text}} if self.shape.is_chat else {"text": text})

    def closing(self, counts: Statistics) -> dict[str, Any]:
        """The last chunk of a stream, with the finish reason."""
        return self._chunk({"delta": {}} if self.shape.is_chat else {"text": ""}, counts.finish)

    def usage(self, counts: Statistics) -> dict[str, Any]:
        """The chunk with token counts after a stream."""
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
