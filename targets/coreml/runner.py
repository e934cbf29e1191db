"""Runs a CoreML artifact: prompts in pieces, and single tokens by the function that skips experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from moec.targets.common.added_inputs import rows
from moec.targets.common.single_sequence import SingleSequenceRunner
from moec.targets.coreml.flavors import call, max_tokens
from moec.targets.coreml.metadata import read_metadata
from moec.targets.coreml.package import PACKAGE
from moec.targets.coreml.predict import Backend, ExecutorBackend, open_backend
from moec.targets.runners import RunnerLimits


class CoremlRunner(SingleSequenceRunner):
    """The Runner of the CoreML target.

    Args:
        directory: The artifact.
        backend: Opens the package; by default Core ML on macOS and moec's executor elsewhere.

    Raises:
            ArtifactError: The package is damaged or was not written by moec.
    """

    target = "CoreML"

    def __init__(self, directory: Path, *, backend: Callable[[Path], Backend] = open_backend) -> None:
        metadata = read_metadata(directory)
        self._flavor = metadata.flavor
        self._context, self._chunk = max_tokens(metadata.flavor, metadata.context), metadata.chunk
        self._defaults = {name: np.asarray(values, np.float32) for name, values in metadata.inputs.items()}
        self._widths: Mapping[str, int] = metadata.token_inputs
        self.overrides: dict[str, np.ndarray] = {}
        """See `moec.targets.runners.AdjustableRunner`."""
        self._backend = backend(directory / PACKAGE)
        self._length = 0
        executor = isinstance(self._backend, ExecutorBackend)
        self.limits = RunnerLimits(
            max_batch=1,
            padding=False,
            max_sequence=self._context,
            repeats_bits=executor,
            stands_in="moec's executor for Core ML" if executor else "",
        )

    def fork(self) -> Self:
        """A second runner with its own states and the same weights."""
        twin = copy.copy(self)
        twin._backend, twin._length = self._backend.fork(), 0
        return twin

    def _forget(self) -> None:
        self._backend.reset()

    def _continue(self, input_ids: np.ndarray) -> np.ndarray:
        given = rows(self._widths, self.overrides, *input_ids.shape)
        logits = []
        for start in range(0, input_ids.shape[1], self._chunk):
            piece = slice(start, start + self._chunk)
            logits.append(self._step(input_ids[:, piece], {name: array[:, piece] for name, array in given.items()}))
        return np.concatenate(logits, axis=1)

    def _step(self, ids: np.ndarray, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """One call with the flavor's convention; by default, a single token goes to the function that skips experts."""
        function, feeds = call(self._flavor, ids, self._length)
        once = {name: np.reshape(self.overrides.get(name, own), own.shape) for name, own in self._defaults.items()}
        logits = self._backend.predict(function, {**feeds, **once, **given})["logits"]
        self._length += ids.shape[1]
        return np.asarray(logits).astype(np.float32, copy=False)

    def facts(self) -> Mapping[str, Any]:
        """Runtime, and its counters if it has any."""
        return {**self._backend.facts(), "context": self._context, "prefill_chunk": self._chunk}
