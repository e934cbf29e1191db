"""Chat templates, rendered as in transformers, without importing it."""

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

from moec.compiler.common.errors import ArtifactError, UsageError, first_line
from moec.compiler.common.model_config import chat_template, read_config


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the model's turns for training and changes no text."""

    tags = {"generation"}  # noqa: RUF012 - declared as an instance variable by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def render_chat(directory: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a conversation in the model's chat template, up to the start of the model's answer.

    Args:
        directory: An artifact whose template is in `chat_template.jinja` or tokenizer_config.json.
        messages: Mappings with "role" and "content".

    Raises:
        UsageError: The model has no chat template, or its template refuses the messages.
        ArtifactError: The template is damaged.
    """
    source = chat_template(directory)
    if source is None:
        hint = "it can only continue texts: omit --chat, or use /v1/completions"
        raise UsageError(f"{directory}: the model has no chat template", hint=hint)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    given: dict[str, Any] = {"messages": list(messages), "tools": None, "documents": None}
    try:
        template = environment.from_string(source)
        text: str = template.render(**special_tokens(directory), **given, add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ArtifactError(f"{directory}: its chat template is damaged: {error}") from error
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        # A template is a program, which may fail on the messages in any of these ways.
        raise UsageError(f"{directory}: the chat template refuses the prompt: {first_line(error)}") from error
    return text


def special_tokens(directory: Path) -> dict[str, str]:
    """Name -> special token that templates may use, such as bos_token, and the named tokens of the model.

    As in `PreTrainedTokenizerBase.__init__` of transformers 5, these are the keys that end in `_token` and the named
    tokens of `extra_special_tokens`.

    Raises:
        ArtifactError: A file of the tokenizer is damaged.
    """
    config = _tokenizer_config(directory)
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(own := config.get(key), Mapping):
            named |= own
    return {name: _text(value) for name, value in named.items() if isinstance(value, str | Mapping)}


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, merged with the older special_tokens_map.json if it lists no added tokens.

    The precedence is that of `PreTrainedTokenizerBase._from_pretrained` in transformers 5.
    """
    config = read_config(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return {**config, **read_config(directory / "special_tokens_map.json")}


def _text(token: Any) -> str:
    """The text of a special token, which is a string or a mapping with "content"."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter of transformers, which unlike jinja2's does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)
