"""Text from an artifact alone: its Runner, its tokenizer file and its configs. Imports no torch and no transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.artifact import MANIFEST, read_manifest
from moec.compiler.errors import ArtifactError, UsageError
from moec.compiler.model_config import context_length, read_json, text_config, token_ids
from moec.targets import get_target

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_k: Only the k most likely tokens; 0 means all.
        top_p: Only the smallest set of most likely tokens whose probabilities reach p (Holtzman et al., 2019).
        seed: Seed of the random draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: A value is out of range, or restricts a draw that greedy decoding does not make.
        """
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"sampling: temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}",
                hint="temperature >= 0, top-k >= 0, 0 < top-p <= 1",
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UsageError("top-k and top-p choose among random draws", hint="set a temperature above 0 as well")

    def choose(self, logits: np.ndarray, random: np.random.Generator) -> int:
        """Next token of logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        scaled = logits[order].astype(np.float64) / self.temperature
        if self.top_k:
            scaled = scaled[: self.top_k]
        probabilities = np.exp(scaled - scaled[0])
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            kept = int(np.searchsorted(probabilities.cumsum(), self.top_p)) + 1
            probabilities = probabilities[:kept] / probabilities[:kept].sum()
        return int(order[random.choice(len(probabilities), p=probabilities)])


@dataclass
class Statistics:
    """Counts and seconds of the last generation."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one, which the prefill yields; 0 if there were none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else 0.0


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
        config = read_json(self.directory / "config.json")
        generation = read_json(self.directory / "generation_config.json")
        self.context_length = context_length(config)
        self.eos_token_ids = token_ids("eos_token_id", generation, config, text_config(config))
        self._bos_token_ids = token_ids("bos_token_id", generation, config, text_config(config))
        name = str(self.manifest.get("recipe", {}).get("target"))
        self.runner = get_target(name).open(self.directory, threads=threads)
        self._set(inputs or {})

    def _set(self, inputs: Mapping[str, float]) -> None:
        rows = self.manifest.get("signature", {}).get("inputs", [])
        scalars = [row["name"] for row in rows if isinstance(row, Mapping) and row.get("shape") == []]
        for name, value in inputs.items():
            if name not in scalars:
                known = f"it has {', '.join(scalars)}" if scalars else "export with --routing-input to get one"
                raise UsageError(f"{self.directory}: no scalar input '{name}' that could be set", hint=known)
            self.runner.overrides[name] = np.asarray(value, np.float32)  # type: ignore[attr-defined]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the artifact.

        Raises:
            ArtifactError: It has none, or a damaged one.
        """
        from tokenizers import Tokenizer

        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(
                f"{self.directory}: it has no tokenizer.json, so it can neither read nor write text",
                hint="put the model's tokenizer.json into the checkpoint and export again",
            )
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{path}: damaged: {error}", hint=f"compare with {MANIFEST}: moec verify") from error

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of `prompt`; with `chat`, as a user's message in the model's chat template.

        Raises:
            UsageError: There is nothing to start from, or no chat template.
        """
        if chat:
            from moec.compiler.run.chat import render_chat

            text = render_chat(self.directory, [{"role": "user", "content": prompt}])
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = self.tokenizer.encode(prompt).ids
        ids = list(ids) or list(self._bos_token_ids[:1])
        if not ids:
            raise UsageError("the prompt is empty, and the model has no token to start from", hint="give --prompt")
        return ids

    def tokens(
        self, input_ids: Sequence[int], *, max_new_tokens: int = DEFAULT_NEW_TOKENS, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield new tokens until an end-of-sequence token, which is not yielded, or `max_new_tokens`.

        Args:
            input_ids: The prompt, at least one token.
            max_new_tokens: At most so many.
            sampling: Greedy if None.

        Raises:
            UsageError: Prompt and new tokens are more than the model allows.
        """
        self._check_length(len(input_ids), max_new_tokens)
        sampling = sampling or Sampling()
        random = np.random.default_rng(sampling.seed)
        self.statistics = statistics = Statistics(prompt_tokens=len(input_ids))
        start = time.perf_counter()
        logits = self.runner.prefill(np.asarray([input_ids], dtype=np.int64))
        statistics.prefill_seconds = time.perf_counter() - start
        while True:
            token = sampling.choose(logits[0, -1], random)
            if token in self.eos_token_ids:
                return
            statistics.new_tokens += 1
            yield token
            if statistics.new_tokens == max_new_tokens:
                return
            start = time.perf_counter()
            logits = self.runner.decode(np.asarray([[token]], dtype=np.int64))
            statistics.decode_seconds += time.perf_counter() - start

    def stream(self, prompt: str | Sequence[int], *, chat: bool = False, **options: Any) -> Iterator[str]:
        """Yield the text of the answer piece by piece; a character that the last token leaves unfinished is dropped.

        Args:
            prompt: Text or token ids.
            chat: Wrap a text in the model's chat template.
            options: `max_new_tokens` and `sampling` of `tokens`.
        """
        from tokenizers.decoders import DecodeStream

        ids = self.encode(prompt, chat=chat) if isinstance(prompt, str) else list(prompt)
        decoder = DecodeStream(ids=ids, skip_special_tokens=True)
        for token in self.tokens(ids, **options):
            if piece := decoder.step(self.tokenizer, token):
                yield piece

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool = False,
    ) -> str:
        """Text that follows `prompt` (a text or token ids). The other arguments are those of Sampling and `tokens`."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        return "".join(self.stream(prompt, chat=chat, max_new_tokens=max_new_tokens, sampling=sampling))

    def _check_length(self, prompt: int, new: int) -> None:
        if not prompt:
            raise UsageError("the prompt is empty", hint="give at least one token")
        if new < 1:
            raise UsageError(f"max_new_tokens is {new}", hint="it must be at least 1")
        limit = self.context_length
        if limit is not None and prompt + new > limit:
            raise UsageError(
                f"the prompt has {prompt} tokens; with {new} new tokens that is more than the {limit} "
                f"that the model allows",
                hint=f"shorten the prompt to {limit - new} tokens, or lower --max-new-tokens"
                if new < limit
                else f"lower --max-new-tokens: prompt and answer share {limit} tokens",
            )
