"""Runs a TFLite artifact with the LiteRT interpreter on CPU. Imports no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import ArtifactError, UsageError
from moec.targets.base import RunnerLimits
from moec.targets.tflite.extra import module
from moec.targets.tflite.reader import TfliteFile

DECODE = "decode"
STATE_PREFIX = "kv_cache_"
_PREFIX = "prefill_"
WORTH_PADDING = 8
"""A prompt's rest is padded to a signature's length if it fills at least one part in so many of it."""


class TfliteRunner:
    """The Runner of the TFLite target.

    A prompt is cut into pieces of the lengths that there are signatures for. The last piece is padded: the logits of
    the padding are dropped, and its slots of the cache lie behind every token until one of them overwrites them.

    Args:
        file: The model.
        threads: Threads of XNNPACK and LiteRT's kernels; 0 is the runtime's default.

    Raises:
        ArtifactError: LiteRT cannot load it.
        MissingExtraError: LiteRT is not installed.
    """

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        runtime = module("ai_edge_litert.interpreter")
        added = TfliteFile(file).facts["inputs"]
        try:
            self._interpreter = runtime.Interpreter(model_path=str(file), num_threads=threads or None)
            signatures = self._interpreter.get_signature_list()
            self._runners = {name: self._interpreter.get_signature_runner(name) for name in signatures}
        except (ValueError, RuntimeError, OSError) as error:
            raise ArtifactError(
                f"{file}: LiteRT cannot load it: {str(error).splitlines()[0]}",
                hint="moec verify tells whether the files are those that were built",
            ) from error
        if DECODE not in self._runners:
            raise ArtifactError(f"{file}: it has no signature '{DECODE}'", hint="export it again")
        details = self._runners[DECODE].get_input_details()
        self._empty = {
            name: np.zeros(item["shape"], item["dtype"])
            for name, item in details.items()
            if name.startswith(STATE_PREFIX)
        }
        self._defaults = {
            name: np.asarray(values, details[name]["dtype"]).reshape(details[name]["shape"])
            for name, values in added.items()
        }
        self.overrides: dict[str, np.ndarray] = {}
        """Values for inputs that have defaults, such as {"routing_budget": array of shape []}."""
        self.capacity = next(iter(self._empty.values())).shape[2]
        self.lengths = tuple(sorted((int(n.removeprefix(_PREFIX)) for n in signatures if n != DECODE), reverse=True))
        self.limits = RunnerLimits(
            max_batch=1, padding=False, max_sequence=self.capacity, prefill_lengths=tuple(reversed(self.lengths))
        )
        self.threads = threads
        self._states = self._empty
        self._length = 0

    def reset(self) -> None:
        """Forget the sequence."""
        self._states, self._length = self._empty, 0

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Start a new sequence; see `moec.targets.base.Runner`."""
        self.reset()
        return self.decode(input_ids, attention_mask)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue it; see `moec.targets.base.Runner`.

        Raises:
            UsageError: There are several sequences, padding, or more tokens than the cache holds.
        """
        batch, length = input_ids.shape
        if batch != 1:
            raise UsageError(f"{batch} sequences at once: the TFLite target runs one", hint="run one after the other")
        if attention_mask is not None and not np.all(attention_mask):
            raise UsageError("the TFLite target takes no padding", hint="give the tokens alone")
        if self._length + length > self.capacity:
            raise UsageError(
                f"{self._length + length} tokens do not fit the cache of {self.capacity}",
                hint="export with a larger --context, or shorten the text",
            )
        logits: list[np.ndarray] = []
        while length:
            size = self._piece(length)
            used = min(size, length)
            logits.append(self._step(input_ids[0, input_ids.shape[1] - length :][:used], size))
            length -= used
        return np.concatenate(logits, axis=1) if logits else np.zeros((1, 0, 0), np.float32)

    def _piece(self, remaining: int) -> int:
        """Length of the signature that takes the next tokens."""
        for size in self.lengths:
            if size <= remaining:
                return size
        fitting = [size for size in self.lengths if self._length + size <= self.capacity]
        # Beyond the capacity LiteRT would move the whole update to where it fits.
        if fitting and remaining > 1 and remaining * WORTH_PADDING >= min(fitting):
            return min(fitting)
        return 1

    def _step(self, tokens: np.ndarray, size: int) -> np.ndarray:
        """Run `tokens` by the signature of `size` tokens; logits [1, len(tokens), V]."""
        padded = np.zeros((1, size), np.int32)
        padded[0, : tokens.size] = tokens
        positions = np.arange(self._length, self._length + size, dtype=np.int32)
        name = DECODE if size == 1 else f"{_PREFIX}{size}"
        feeds = {"tokens": padded, "input_pos": positions, **self._defaults, **self.overrides, **self._states}
        results = self._runners[name](**feeds)
        logits: np.ndarray = results.pop("logits")
        self._states = results
        self._length += tokens.size
        return logits[:, : tokens.size]

    def facts(self) -> Mapping[str, Any]:
        """Runtime, version, threads, and the shapes that the file has signatures for."""
        version = importlib.metadata.version("ai-edge-litert")
        return {
            "runtime": f"ai-edge-litert {version}",
            "threads": self.threads,
            "context": self.capacity,
            "prefill_lengths": sorted(self.lengths),
        }
