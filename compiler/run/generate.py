"""Text from an artifact alone: its Runner, its tokenizer file and its configs. Imports no torch and no transformers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.common.model_config import (
    context_length,
    end_tokens,
    read_config,
    text_config,
    token_ids,
    vocabulary_size,
)
from moec.compiler.run.session import Answer, Session, Statistics
from moec.compiler.text.sampling import Sampling, sampling_of
from moec.compiler.text.tokenizer import open_tokenizer
from moec.targets import get_target
from moec.targets.base import AdjustableRunner, Runner, fork, limits_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_NEW_TOKENS = 128
GENERATION_CONFIG = "generation_config.json"


class Generator:
    """An artifact that writes text. `moec.load(directory)` makes one.

    Args:
        directory: The artifact.
        threads: Threads of the runtime; 0 leaves it to the runtime.
        inputs: Values of scalar inputs that have a default, such as {"routing_budget": 0.7}.

    Raises:
        ArtifactError: No artifact, or a file is missing.
        UsageError: The artifact has no such input.
        MissingExtraError: Its runtime is not installed.
    """

    def __init__(self, directory: str | Path, *, threads: int = 0, inputs: Mapping[str, float] | None = None) -> None:
        self.directory = Path(directory).expanduser()
        self.manifest = read_manifest(self.directory)
        if missing := [name for name in self.manifest["files"] if not (self.directory / name).is_file()]:
            raise ArtifactError(f"{self.directory}: damaged: {', '.join(missing)} missing", hint="copy it again")
        self.statistics = Statistics()
        """Of the generation that began last."""
        config = read_config(self.directory / "config.json")
        self._generation = read_config(self.directory / GENERATION_CONFIG)
        self.eos_token_ids = end_tokens(self._generation, config)
        self._bos_token_ids = token_ids("bos_token_id", self._generation, config, text_config(config))
        self._vocabulary = vocabulary_size(config)
        self.sampling()  # a generation_config.json that makes no sense is said at once
        name = str(self.manifest.get("recipe", {}).get("target"))
        self.runner = get_target(name).open(self.directory, threads=threads)
        self.context_length = _least(context_length(config), limits_of(self.runner).max_sequence)
        self._overrides = self.runner.overrides if isinstance(self.runner, AdjustableRunner) else {}
        self._overrides |= self._scalars(inputs or {})
        self._idle: list[Runner] = [self.runner]
        self._lock = threading.Lock()

    def _scalars(self, inputs: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Values of scalar inputs as a runner takes them."""
        for name in inputs:
            if name not in self.scalar_inputs:
                known = ", ".join(self.scalar_inputs)
                hint = f"it has {known}" if known else "export with --routing-input to get one"
                raise UsageError(f"{self.directory}: no scalar input '{name}' that could be set", hint=hint)
            if not isinstance(self.runner, AdjustableRunner):
                reason = f"{self.directory}: what runs it here feeds '{name}' its default and nothing else"
                raise UsageError(reason, hint="export with another default: --expert-budget")
        return {name: np.asarray(value, np.float32) for name, value in inputs.items()}

    @property
    def scalar_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that hold one number and have a default, such as "routing_budget"."""
        rows = self.manifest.get("signature", {}).get("inputs", [])
        return tuple(row["name"] for row in rows if isinstance(row, Mapping) and row.get("shape") == [])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the artifact.

        Raises:
            ArtifactError: It has none, or a damaged one.
        """
        return open_tokenizer(self.directory, ArtifactError)

    def sampling(self, **given: Any) -> Sampling:
        """How tokens are chosen: as generation_config.json says, and what is given over it.

        Args:
            given: Fields of `Sampling`; None is not given.

        Raises:
            UsageError: A value is out of range.
            ArtifactError: One of generation_config.json is.
        """
        return sampling_of(self._generation, given, where=str(self.directory / GENERATION_CONFIG))

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of `prompt`; with `chat`, as a user's message in the model's chat template.

        Raises:
            UsageError: There is nothing to start from, or no chat template.
        """
        if chat:
            return self.encode_chat([{"role": "user", "content": prompt}])
        ids = list(self.tokenizer.encode(prompt).ids) or list(self._bos_token_ids[:1])
        if not ids:
            raise UsageError("the prompt is empty, and the model has no token to start from", hint="give --prompt")
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to where its answer begins.

        Args:
            messages: Mappings with "role" and "content".

        Raises:
            UsageError: The model has no chat template, or its template refuses the messages.
        """
        from moec.compiler.run.chat import render_chat

        text = render_chat(self.directory, messages)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def tokens(
        self, input_ids: Sequence[int], *, max_new_tokens: int = DEFAULT_NEW_TOKENS, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield new tokens until an end-of-sequence token, which is not yielded, or `max_new_tokens`.

        Args:
            input_ids: The prompt, at least one token.
            max_new_tokens: At most so many.
            sampling: None: what the model's generation_config.json says.

        Several generations may be under way at a time, in one thread or in several: each has states of its own.

        Raises:
            UsageError: Prompt and new tokens are more than the model allows, or a token is not in its vocabulary; or
                another generation is under way and the runner of the target keeps one sequence alone.
        """
        with self.session() as session:
            answer = self.answer(session, input_ids, max_new_tokens=max_new_tokens, sampling=sampling)
            yield from (token for token in answer.tokens() if token is not None)

    @contextmanager
    def session(self, inputs: Mapping[str, float] | None = None) -> Iterator[Session]:
        """A sequence of its own, on an idle runner or on a fork of it, which is given back at the end.

        Args:
            inputs: Values of scalar inputs, over those that the generator was made with.

        Raises:
            UsageError: The artifact has no such input; or another sequence is in use and the runner of the target
                keeps one alone.
        """
        own = self._scalars(inputs or {})
        with self._lock:
            runner = self._idle.pop() if self._idle else fork(self.runner)
        try:
            if isinstance(runner, AdjustableRunner):
                runner.overrides = {**self._overrides, **own} if own else self._overrides
            yield Session(runner)
        finally:
            runner.reset()
            with self._lock:
                self._idle.append(runner)

    def answer(
        self,
        session: Session,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Answer:
        """An answer to a prompt, which is computed as its tokens or pieces are taken.

        Args:
            session: What it continues, if the prompt begins with what the session has seen.
            prompt: Token ids, at least one.
            max_new_tokens: At most so many.
            sampling: None: what the model's generation_config.json says.
            stop: Of these, special tokens end the answer, since no text shows them; `Answer.pieces` takes care of all.

        Raises:
            UsageError: Prompt and new tokens are more than the artifact allows, or a token is not in its vocabulary.
        """
        self.check(prompt, max_new_tokens)
        ends = (*self.eos_token_ids, *(self._special_tokens[text] for text in stop if text in self._special_tokens))
        sampling = self.sampling() if sampling is None else sampling
        answer = Answer(session, prompt, sampling=sampling, end_tokens=ends, max_new_tokens=max_new_tokens)
        self.statistics = answer.statistics
        return answer

    @cached_property
    def _special_tokens(self) -> dict[str, int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def stream(
        self, prompt: str | Sequence[int], *, chat: bool = False, stop: Sequence[str] = (), **options: Any
    ) -> Iterator[str]:
        """Yield the text of the answer piece by piece, each as soon as its last character is finished.

        Args:
            prompt: Text or token ids.
            chat: Wrap a text in the model's chat template.
            stop: Strings before which the text ends.
            options: `max_new_tokens` and `sampling` of `tokens`.
        """
        ids = self.encode(prompt, chat=chat) if isinstance(prompt, str) else list(prompt)
        with self.session() as session:
            answer = self.answer(session, ids, stop=stop, **options)
            yield from filter(None, answer.pieces(self.tokenizer, stop))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        chat: bool = False,
        stop: Sequence[str] = (),
        **sampling: float | None,
    ) -> str:
        """Text that follows a prompt.

        Args:
            prompt: A text, or token ids.
            max_new_tokens: At most so many new tokens.
            chat: Wrap a text in the model's chat template.
            stop: Strings before which the text ends.
            sampling: Fields of `Sampling`, over what the model's generation_config.json says.

        Raises:
            UsageError: As for `tokens` and `encode`.
        """
        chosen = self.sampling(**sampling)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": chosen}
        return "".join(self.stream(prompt, chat=chat, stop=stop, **options))

    def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that cannot be answered.

        Raises:
            UsageError: Prompt and new tokens are more than the artifact allows, or a token is not in its vocabulary.
        """
        self._check_length(len(prompt), max_new_tokens)
        self._check_ids(prompt)

    def _check_ids(self, ids: Sequence[int]) -> None:
        limit = self._vocabulary
        if limit is not None and (wrong := [index for index in ids if not 0 <= index < limit]):
            raise UsageError(
                f"the prompt holds token {wrong[0]}, and the model's vocabulary has {limit} entries",
                hint="the tokenizer.json of the artifact belongs to another model, or has tokens that were added to it",
            )

    def _check_length(self, prompt: int, new: int) -> None:
        if not prompt:
            raise UsageError("the prompt is empty", hint="give at least one token")
        if new < 1:
            raise UsageError(f"max_new_tokens is {new}", hint="it must be at least 1")
        limit = self.context_length
        if limit is not None and prompt + new > limit:
            raise UsageError(
                f"the prompt has {prompt} tokens; with {new} new tokens that is more than the {limit} "
                f"that the artifact allows",
                hint=f"shorten the prompt to {limit - new} tokens, or lower --max-new-tokens"
                if new < limit
                else f"lower --max-new-tokens: prompt and answer share {limit} tokens",
            )


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
