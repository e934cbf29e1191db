"""Runs a TFLite artifact on CPU with the runtime that it was built for. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moec.targets.common.added_inputs import rows
from moec.targets.common.single_sequence import SingleSequenceRunner
from moec.targets.runners import RunnerLimits
from moec.targets.tflite.engine import DECODE, REPLACED_PREFIXES, TOKEN_COUNT, Engine, LitertEngine
from moec.targets.tflite.legacy_runtime import LegacyEngine
from moec.targets.tflite.reader import LEGACY_RUNTIME, TfliteFile

_PREFIX = "prefill_"
MAX_PADDING_FACTOR = 8
"""The rest of a prompt is padded to a signature of at most this many times its length."""


class TfliteRunner(SingleSequenceRunner):
    """The Runner of the TFLite target.

    A prompt is cut into pieces of the signatures' lengths, and the last piece is padded at its end. The logits of the
    padding are dropped, its cache slots come after every token until a token overwrites them, and other states
    exclude it.

    Args:
        file: The model.
        threads: Threads of XNNPACK and of LiteRT's kernels; 0: the runtime's default.

    Raises:
        ArtifactError: The runtime cannot load the file.
        MissingExtraError: The runtime is not installed.
    """

    target = "TFLite"

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        facts = TfliteFile(file).facts
        make = LegacyEngine if facts.get("runtime") == LEGACY_RUNTIME else LitertEngine
        self._engine: Engine = make(file, threads)
        places = self._engine.inputs
        self._defaults = {
            name: np.asarray(values, places[name].dtype).reshape(places[name].shape)
            for name, values in facts["inputs"].items()
        }
        self._widths: Mapping[str, int] = facts.get("token_inputs", {})
        self.overrides: dict[str, np.ndarray] = {}
        """See `moec.targets.runners.AdjustableRunner`."""
        self.capacity = int(facts["capacity"])
        self._borders: Sequence[int] = facts.get("rotary_borders", ())
        self._counts = any(name.startswith(REPLACED_PREFIXES) for name in places)
        sizes = (int(n.removeprefix(_PREFIX)) for n in self._engine.signatures if n != DECODE)
        self.lengths = tuple(sorted(sizes, reverse=True))
        self.limits = RunnerLimits(
            max_batch=1, padding=False, max_sequence=self.capacity, prefill_lengths=tuple(reversed(self.lengths))
        )
        self._file, self.threads = file, threads
        self.reset()

    def fork(self) -> TfliteRunner:
        """A second runner with its own interpreter, which holds its states; both memory-map the same file."""
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
        """Length of the signature for the next piece of `remaining` tokens."""
        for size in self.lengths:
            if size <= remaining:
                return size
        end = self._length + remaining
        fitting = [
            size
            for size in self.lengths
            if self._length + size <= self.capacity
            # Padding counts as tokens where rotary frequencies depend on the length.
            and not any(end <= border < self._length + size for border in self._borders)
        ]
        # An update that exceeds the capacity must be avoided: LiteRT would shift it back until it fits.
        if fitting and remaining > 1 and remaining * MAX_PADDING_FACTOR >= min(fitting):
            return min(fitting)
        return 1

    def _step(self, tokens: np.ndarray, size: int, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run `tokens` by the signature of `size` tokens; `given` are rows of added inputs. Logits [1, tokens, V]."""
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
        """Runtime, its version, threads, and the lengths of the signatures."""
        return {
            "runtime": self._engine.runtime,
            "threads": self.threads,
            "context": self.capacity,
            "prefill_lengths": sorted(self.lengths),
        }
