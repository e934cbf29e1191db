"""Generate text from an artifact by its Runner, tokenizer and configs. Imports neither torch nor transformers."""

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
from moec.compiler.common.progress import Progress
from moec.compiler.common.sizes import byte_count
from moec.compiler.run.packing import open_packed
from moec.compiler.run.session import Answer, Session, Statistics
from moec.compiler.text.sampling import Sampling, sampling_of
from moec.compiler.text.tokenizer import encode, open_tokenizer
from moec.targets import get_target
from moec.targets.runners import AdjustableRunner, Runner, fork, limits_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_NEW_TOKENS = 128
GENERATION_CONFIG = "generation_config.json"


class Generator:
    """Generates text from an artifact; made by `moec.load(directory)`.

    Args:
        directory: The artifact.
        threads: Threads of the runtime; 0 leaves it to the runtime.
        inputs: Values of scalar inputs that have a default, such as {"routing_budget": 0.7}.
        pack: Whether to open packed weights, and to pack those of a large artifact now if nobody has
            (`moec.compiler.run.packing`).
        memory_limit: Bytes of memory for weights, or a text such as "2GB": experts are left on the disk until tokens
            are routed to them. None: what the container allows.
        progress: Called while weights are packed.

    Raises:
        ArtifactError: The directory is not an artifact, or a file is missing.
        UsageError: The artifact has no input of one of these names, or the limit cannot be kept.
        MissingExtraError: The runtime of the target is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        threads: int = 0,
        inputs: Mapping[str, float] | None = None,
        pack: bool = True,
        memory_limit: str | int | None = None,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.directory = Path(directory).expanduser()
        self.manifest = read_manifest(self.directory)
        if missing := [name for name in self.manifest["files"] if not (self.directory / name).is_file()]:
            raise ArtifactError(f"{self.directory}: damaged: {', '.join(missing)} missing", hint="copy it again")
        self.statistics = Statistics()
        """Statistics of the generation that was started last."""
        config = read_config(self.directory / "config.json")
        self._generation = read_config(self.directory / GENERATION_CONFIG)
        self.eos_token_ids = end_tokens(self._generation, config)
        self._bos_token_ids = token_ids("bos_token_id", self._generation, config, text_config(config))
        self._vocabulary = vocabulary_size(config)
        self.sampling()  # raises for an invalid generation_config.json
        name = str(self.manifest.get("recipe", {}).get("target"))
        target = get_target(name)
        self.note = ""
        """What packing could not do, for people; empty if there is nothing to say."""
        memory = byte_count(memory_limit, "memory_limit") if isinstance(memory_limit, str) else memory_limit
        if pack:
            opened = open_packed(
                self.directory, self.manifest, target, threads=threads, memory=memory, progress=progress
            )
            self.runner, self.note = opened
        elif memory is not None:
            raise UsageError("a limit on memory needs packed weights", hint="leave out --no-pack, or pack=False")
        else:
            self.runner = target.open(self.directory, threads=threads)
        self.context_length = _least(context_length(config), limits_of(self.runner).max_sequence)
        self._overrides = self.runner.overrides if isinstance(self.runner, AdjustableRunner) else {}
        self._overrides |= self._scalars(inputs or {})
        self._idle: list[Runner] = [self.runner]
        self._lock = threading.Lock()

    def _scalars(self, inputs: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Values of scalar inputs as arrays for a runner.

        Raises:
            UsageError: The artifact has no such input, or its runner cannot set it.
        """
        for name in inputs:
            if name not in self.scalar_inputs:
                known = ", ".join(self.scalar_inputs)
                hint = f"its scalar inputs: {known}" if known else "export with --routing-input to get one"
                raise UsageError(f"{self.directory}: it has no scalar input '{name}'", hint=hint)
            if not isinstance(self.runner, AdjustableRunner):
                reason = f"{self.directory}: its runner supports only the default of '{name}'"
                raise UsageError(reason, hint="export with another default: --expert-budget")
        return {name: np.asarray(value, np.float32) for name, value in inputs.items()}

    @property
    def scalar_inputs(self) -> tuple[str, ...]:
        """Names of the scalar inputs, which have a default, such as "routing_budget"."""
        rows = self.manifest.get("signature", {}).get("inputs", [])
        own = [row["name"] for row in rows if isinstance(row, Mapping) and row.get("shape") == []]
        # Targets with several signatures list the defaults of added inputs among the facts.
        added = self.manifest.get("facts", {}).get("inputs", {})
        return (*own, *(name for name, values in added.items() if len(values) == 1))

    @property
    def rounds_coarsely(self) -> bool:
        """Whether another order of summation is likely to show in texts: float16, or activations or caches in int8."""
        found = self.manifest.get("quantization", {})
        formats = [form for each in found.get("classes", {}).values() for form in each.get("formats", {})]
        rounded = "kv_cache" in found or any("int8-dynamic" in form for form in formats)
        return self.manifest.get("recipe", {}).get("dtype") == "fp16" or rounded

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the artifact.

        Raises:
            ArtifactError: The artifact has no tokenizer.json, or it is damaged.
        """
        return open_tokenizer(self.directory, ArtifactError)

    def sampling(self, **given: Any) -> Sampling:
        """The sampling settings of generation_config.json, overridden by `given`.

        Args:
            given: Fields of `Sampling`; None means not given.

        Raises:
            UsageError: A given value is out of range.
            ArtifactError: A value of generation_config.json is out of range.
        """
        return sampling_of(self._generation, given, where=str(self.directory / GENERATION_CONFIG))

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of `prompt`; with `chat`, as a user's message in the model's chat template.

        Raises:
            UsageError: The prompt is empty and the model has no bos token, or the model has no chat template.
            ArtifactError: The tokenizer cannot encode the prompt.
        """
        if chat:
            return self.encode_chat([{"role": "user", "content": prompt}])
        ids = encode(self.tokenizer, prompt, ArtifactError) or list(self._bos_token_ids[:1])
        if not ids:
            raise UsageError("the prompt is empty, and the model has no bos token", hint="give a prompt")
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to the start of the model's answer.

        Args:
            messages: Mappings with "role" and "content".

        Raises:
            UsageError: The model has no chat template, or its template refuses the messages.
        """
        from moec.compiler.run.chat import render_chat

        text = render_chat(self.directory, messages)
        return encode(self.tokenizer, text, ArtifactError, special=False)

    def tokens(
        self, input_ids: Sequence[int], *, max_new_tokens: int = DEFAULT_NEW_TOKENS, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield new tokens until an end-of-sequence token, which is not yielded, or until `max_new_tokens`.

        Several generations may run at the same time, in one thread or several; each has its own states.

        Args:
            input_ids: The prompt, at least one token.
            max_new_tokens: Largest number of new tokens.
            sampling: Sampling settings; None: those of the model's generation_config.json.

        Raises:
            UsageError: Prompt and new tokens exceed the context, a token is not in the vocabulary, or another
                generation is running and the runner supports only one sequence.
        """
        with self.session() as session:
            answer = self.answer(session, input_ids, max_new_tokens=max_new_tokens, sampling=sampling)
            yield from (token for token in answer.tokens() if token is not None)

    @contextmanager
    def session(self, inputs: Mapping[str, float] | None = None) -> Iterator[Session]:
        """Open a new sequence on an idle runner or a fork of it, which is released at the end of the block.

        Args:
            inputs: Values of scalar inputs, which override those of the generator.

        Raises:
            UsageError: The artifact has no such input, or another sequence is in use and the runner supports only one.
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
        """An answer to a prompt, which is computed while its tokens or pieces are iterated.

        Args:
            session: The session; its KV cache is reused if the prompt begins with the tokens that it has seen.
            prompt: Token ids, at least one.
            max_new_tokens: Largest number of new tokens.
            sampling: Sampling settings; None: those of the model's generation_config.json.
            stop: Stop strings. Here those that are special tokens end the answer, since they do not appear in the text;
                `Answer.pieces` handles the others.

        Raises:
            UsageError: Prompt and new tokens exceed the context, or a token is not in the vocabulary.
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
        """Yield the text of the answer piece by piece, each as soon as its last character is complete.

        Args:
            prompt: Text or token ids.
            chat: Whether to wrap a text in the model's chat template.
            stop: Strings before which the text ends.
            options: `max_new_tokens` and `sampling`, as for `tokens`.

        Raises:
            UsageError: As for `tokens` and `encode`.
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
        """Return the text that follows a prompt.

        Args:
            prompt: Text or token ids.
            max_new_tokens: Largest number of new tokens.
            chat: Whether to wrap a text in the model's chat template.
            stop: Strings before which the text ends.
            sampling: Fields of `Sampling`, which override the model's generation_config.json.

        Raises:
            UsageError: As for `tokens` and `encode`.
        """
        chosen = self.sampling(**sampling)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": chosen}
        return "".join(self.stream(prompt, chat=chat, stop=stop, **options))

    def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Check that a prompt can be answered.

        Raises:
            UsageError: Prompt and new tokens exceed the context, or a token is not in the vocabulary.
        """
        self._check_length(len(prompt), max_new_tokens)
        self._check_ids(prompt)

    def _check_ids(self, ids: Sequence[int]) -> None:
        limit = self._vocabulary
        if limit is not None and (wrong := [index for index in ids if not 0 <= index < limit]):
            raise UsageError(
                f"the prompt has the token {wrong[0]}, and the model's vocabulary has {limit} entries",
                hint="the tokenizer.json of the artifact belongs to another model, or tokens were added to it",
            )

    def _check_length(self, prompt: int, new: int) -> None:
        if not prompt:
            raise UsageError("the prompt is empty", hint="give at least one token")
        if new < 1:
            raise UsageError(f"max_new_tokens is {new}", hint="it must be at least 1")
        limit = self.context_length
        if limit is not None and prompt + new > limit:
            raise UsageError(
                f"the prompt has {prompt} tokens; with {new} new tokens it exceeds the {limit} tokens "
                f"that the artifact allows",
                hint=f"shorten the prompt to {limit - new} tokens, or lower --max-new-tokens"
                if new < limit
                else f"lower --max-new-tokens: prompt and answer share {limit} tokens",
            )


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
