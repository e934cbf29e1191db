"""Requests of OpenAI's API: the supported fields, and the handling of others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from moec.compiler.run.server.errors import ApiError

COMPLETION_TOKENS = 16
"""Default of `max_tokens` for /v1/completions, as in OpenAI's documentation."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
}
"""Field of OpenAI's API that is not supported -> values besides null that have no effect and are allowed."""

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = Field(False, description="Send token counts in a last chunk.")
    include_obfuscation: bool = Field(False, description="Ignored.")


class Common(BaseModel):
    """Fields of both endpoints; those after `metadata` are extensions of OpenAI's API."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, str] | None = Field(None, description="Ignored.")
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    routing_budget: float | None = Field(None, ge=0, description="Threshold of dynamic routing (--routing-input).")

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> dict[str, float | None]:
        """The given fields of `Sampling`, without top_p, top_k and min_p if the temperature is 0."""
        given = {"temperature": self.temperature, "repetition_penalty": self.repetition_penalty}
        if self.temperature != 0:
            given |= {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return given


class TextPart(BaseModel):
    """A text part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="Ignored.")
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None

    @property
    def turn(self) -> dict[str, str]:
        """Role and content for a chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]


Asked = TypeVar("Asked", bound=Common)


def parse(body: bytes, kind: type[Asked]) -> Asked:
    """Parse a request.

    Raises:
        ApiError: The request is not valid; the status is 400, and the message names the field.
    """
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(fields, ensure_ascii=False).encode("utf-8")  # raises for an unpaired surrogate
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    fields = {name: value for name, value in fields.items() if not _has_no_effect(name, value)}
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _api_error(error, kind) from error


def _has_no_effect(name: str, value: Any) -> bool:
    if name not in _NEUTRAL:
        return False
    same = (value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name])
    if value is None or any(same):
        return True
    raise ApiError(400, f"'{name}' is not supported by this server; omit it", param=name, code="unsupported_parameter")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _api_error(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    first = _most_telling(error.errors(include_url=False))
    where = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields)) if len(first["loc"]) == 1 else ""
        hint = f"; fields are {known}" if known else ""
        return ApiError(400, f"unknown parameter '{where}'{hint}", param=where, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"'{where}' is missing", param=where, code="missing_required_parameter")
    return ApiError(400, f"'{where}': {first['msg']}", param=where, code="invalid_value")


def _most_telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """Of the errors of a union field, one per member, the error of the member that matched best."""
    same_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    return max(same_field, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))


def _path(location: tuple[int | str, ...]) -> str:
    """A path such as `messages[1].content`, without the names of union members that pydantic adds."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in {"str", "int", "float", "TextPart"}:
            text += f".{part}" if text else part
    return text
