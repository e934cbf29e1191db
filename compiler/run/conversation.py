"""A conversation with an artifact: turns in the model's chat template, in one session."""

from __future__ import annotations

from collections import abc
from collections.abc import Sequence

from moec.compiler.common.errors import UsageError
from moec.compiler.common.model_config import chat_template
from moec.compiler.run.generate import Generator
from moec.compiler.run.session import Session, Statistics
from moec.compiler.text.sampling import Sampling


class Conversation:
    """Turns of a user and the model.

    For each turn, the whole conversation is put into the model's chat template. If its tokens begin with those that the
    session has seen, only the rest is computed. Templates that change earlier turns (by trimming text or leaving out
    thoughts) make the session start again.

    Args:
        generator: The artifact.
        session: A session of it, used only by this conversation.
        sampling: Sampling settings.
        max_new_tokens: Largest number of tokens of an answer.
        stop: Strings before which an answer ends.
        system: The system prompt; empty for none.
        raw: Whether each text is continued on its own, without template and history.

    Raises:
        UsageError: The model has no chat template, unless `raw`.
    """

    def __init__(
        self,
        generator: Generator,
        session: Session,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        system: str = "",
        raw: bool = False,
    ) -> None:
        if not raw and chat_template(generator.directory) is None:
            raise UsageError(
                f"{generator.directory}: the model has no chat template, so it was not made for conversations",
                hint="give --raw to complete each line on its own, or put a template into chat_template.jinja",
            )
        self.generator, self.session, self.sampling = generator, session, sampling
        self.max_new_tokens, self.stop, self.system, self.raw = max_new_tokens, tuple(stop), system, raw
        self.messages: list[dict[str, str]] = []
        self.statistics = Statistics()
        """Statistics of the last answer."""

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because the context was full."""
        counts, limit = self.statistics, self.generator.context_length
        return limit is not None and counts.finish == "length" and counts.prompt_tokens + counts.new_tokens == limit

    def reset(self) -> None:
        """Start a new conversation with the same system prompt."""
        self.messages.clear()

    def ask(self, text: str) -> abc.Generator[str, None, None]:
        """Yield the answer to `text` step by step; a step that completes no character yields an empty string.

        The text yielded until the iterator is closed becomes part of the conversation. A turn without any answer does
        not.

        Raises:
            UsageError: The context is full, or the template refuses the conversation.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(asked)
        answer = self.generator.answer(
            self.session, ids, max_new_tokens=self._room(len(ids)), sampling=self.sampling, stop=self.stop
        )
        self.statistics = answer.statistics
        said: list[str] = []
        try:
            for piece in answer.pieces(self.generator.tokenizer, self.stop):
                said.append(piece)
                yield piece
        finally:
            if whole := "".join(said):
                self.messages = [*asked, {"role": "assistant", "content": whole}]

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        if self.raw:
            return self.generator.encode(messages[-1]["content"])
        told = [{"role": "system", "content": self.system}] if self.system else []
        return self.generator.encode_chat([*told, *messages])

    def _room(self, tokens: int) -> int:
        """The largest number of tokens of an answer to a prompt of `tokens` tokens.

        Raises:
            UsageError: The context is full.
        """
        limit = self.generator.context_length
        if limit is None:
            return self.max_new_tokens
        if tokens >= limit:
            what = "the text" if self.raw or not self.messages else "the conversation"
            raise UsageError(
                f"the context is full: {what} has {tokens} tokens with this turn, and the artifact allows {limit}",
                hint="shorten the text" if what == "the text" else "/reset starts a new conversation",
            )
        return min(self.max_new_tokens, limit - tokens)
