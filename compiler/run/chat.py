"""Chat templates, rendered as transformers renders them, without importing it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moec.compiler.errors import ArtifactError, UsageError
from moec.compiler.model_config import read_json


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the model's own turns for training: it changes no text."""

    tags = {"generation"}  # noqa: RUF012 - declared as an instance variable by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the block by what it encloses."""
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def render_chat(directory: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """Text of a conversation, ready for the model's answer.

    Args:
        directory: An artifact with `chat_template.jinja`, or a template in tokenizer_config.json.
        messages: Mappings with "role" and "content".

    Raises:
        UsageError: The model has no chat template, or its template refuses the messages.
        ArtifactError: The template is damaged.
    """
    config = read_json(directory / "tokenizer_config.json")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    special = {name: _text(config[name]) for name in ("bos_token", "eos_token", "pad_token") if name in config}
    try:
        template = environment.from_string(_template(directory, config))
        text: str = template.render(messages=list(messages), add_generation_prompt=True, **special)
    except TemplateSyntaxError as error:
        raise ArtifactError(f"{directory}: its chat template is damaged: {error}") from error
    except TemplateError as error:
        raise UsageError(f"{directory}: the chat template refuses the prompt: {error}") from error
    return text


def _template(directory: Path, config: Mapping[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if not isinstance(template, str):
        raise UsageError(f"{directory}: the model has no chat template", hint="leave out --chat")
    return template


def _text(token: Any) -> str:
    """A special token is a string, or an object with its content."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)
