"""Runs a TFLite artifact with LiteRT, or with the runtime that it was built for, on CPU. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moec.targets.base import RunnerLimits
from moec.targets.common.added_inputs import rows
from moec.targets.common.one_sequence import OneSequence
from moec.targets.tflite.engine import DECODE, REPLACED_PREFIXES, TOKEN_COUNT, Engine, LitertEngine
from moec.targets.tflite.former_runtime import OlderEngine
from moec.targets.tflite.reader import OLDER, TfliteFile

_PREFIX = "prefill_"
WORTH_PADDING = 8
"""A prompt's rest is padded to a signature's length if it fills at least one part in so many of it."""


class TfliteRunner(OneSequence):
    """The Runner of the TFLite target.

    A prompt is cut into pieces of the lengths that there are signatures for. The last piece is padded: the logits of
    the padding are dropped, its slots of the cache lie behind every token until one of them overwrites them, and other
    states are those before it.

    Args:
        file: The model.
        threads: Threads of XNNPACK and LiteRT's kernels; 0 is the runtime's default.

    Raises:
        ArtifactError: The runtime cannot load it.
        MissingExtraError: The runtime is not installed.
    """

    target = "TFLite"

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        facts = TfliteFile(file).facts
        make = OlderEngine if facts.get("runtime") == OLDER else LitertEngine
        self._engine: Engine = make(file, threads)
        places = self._engine.inputs
        self._defaults = {
            name: np.asarray(values, places[name].dtype).reshape(places[name].shape)
            for name, values in facts["inputs"].items()
        }
        self._widths: Mapping[str, int] = facts.get("token_inputs", {})
        self.overrides: dict[str, np.ndarray] = {}
        """See `moec.targets.base.Runner`."""
        self.capacity = int(facts["capacity"])
        self._counts = any(name.startswith(REPLACED_PREFIXES) for name in places)
        sizes = (int(n.removeprefix(_PREFIX)) for n in self._engine.signatures if n != DECODE)
        self.lengths = tuple(sorted(sizes, reverse=True))
        self.limits = RunnerLimits(
            max_batch=1, padding=False, max_sequence=self.capacity, prefill_lengths=tuple(reversed(self.lengths))
        )
        self._file, self.threads = file, threads
        self.reset()

    def fork(self) -> TfliteRunner:
        """A runner with an interpreter of its own: LiteRT keeps the states in it. Both map the same file."""
        twin = TfliteRunner(self._file, threads=self.threads)
        twin.overrides = self.overrides
        return twin

    def _forget(self) -> None:
        self._engine.reset()

    def _continue(self, input_ids: np.ndarray) -> np.ndarray:
        length = input_ids.shape[1]
        given = rows(self._widths, self.overrides, 1, length)
        logits: list[np.ndarray] = []
        while length:
            size = self._piece(length)
            used = min(size, length)
            first = input_ids.shape[1] - length
            piece = {name: array[:, first : first + used] for name, array in given.items()}
            logits.append(self._step(input_ids[0, first : first + used], size, piece))
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

    def _step(self, tokens: np.ndarray, size: int, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run `tokens` by the signature of `size` tokens, with their rows of inputs; logits [1, len(tokens), V]."""
        padded = np.zeros((1, size), np.int32)
        padded[0, : tokens.size] = tokens
        positions = np.arange(self._length, self._length + size, dtype=np.int32)
        feeds = {"tokens": padded, "input_pos": positions, **self._defaults, **self.overrides}
        for name, array in given.items():
            behind = ((0, 0), (0, size - tokens.size), (0, 0))
            feeds[name] = np.pad(np.asarray(array, np.float32), behind)
        if self._counts and size > 1:
            feeds[TOKEN_COUNT] = np.array([tokens.size], np.int32)
        logits = self._engine.run(DECODE if size == 1 else f"{_PREFIX}{size}", feeds)
        self._length += tokens.size
        return logits[:, : tokens.size]

    def facts(self) -> Mapping[str, Any]:
        """Runtime, version, threads, and the shapes that the file has signatures for."""
        return {
            "runtime": self._engine.runtime,
            "threads": self.threads,
            "context": self.capacity,
            "prefill_lengths": sorted(self.lengths),
        }
