"""Runs the signatures of a `.tflite` file with LiteRT in this process. Imports no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.threads import threads_for
from moec.targets.tflite.library import module

DECODE = "decode"
CACHE_PREFIX, CONVOLUTION_PREFIX, RECURRENCE_PREFIX = "kv_cache_", "conv_state_", "recurrent_state_"
REPLACED_PREFIXES = (CONVOLUTION_PREFIX, RECURRENCE_PREFIX)
"""Prefixes of the names of states that each step replaces as a whole."""
STATE_PREFIXES = (CACHE_PREFIX, *REPLACED_PREFIXES)
"""Prefixes of the names of all states; no other tensor has them. `legacy_runtime_worker.py` repeats them."""
TOKEN_COUNT = "token_count"
"""Input of prefill signatures in models with states other than KV caches; see `moec.targets.tflite.states`."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Shape and dtype of an input of `decode`."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Engine(Protocol):
    """A model file that is loaded in a runtime, together with its states.

    Attributes:
        runtime: Name and version of the runtime.
        signatures: Names of the signatures.
        inputs: The inputs of `decode` by name.
    """

    runtime: str
    signatures: tuple[str, ...]
    inputs: Mapping[str, InputSpec]

    def reset(self) -> None:
        """Fill the states with zeros."""

    def run(self, signature: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run one signature, update the states, and return logits [1, S, V] float32."""


def cannot_load(file: Path, runtime: str, error: Exception | str) -> ArtifactError:
    """The error for a file that `runtime` cannot load."""
    return ArtifactError(
        f"{file}: {runtime} cannot load it: {(str(error).splitlines() or ['no reason given'])[0]}",
        hint="`moec verify` checks whether the files are still as they were built",
    )


class LitertEngine:
    """LiteRT's interpreter on CPU.

    Args:
        file: The model.
        threads: Threads of XNNPACK and of LiteRT's kernels; 0: the runtime's default.

    Raises:
        ArtifactError: LiteRT cannot load the file.
        MissingExtraError: LiteRT is not installed.
    """

    def __init__(self, file: Path, threads: int) -> None:
        interpreters = module("ai_edge_litert.interpreter")
        self.runtime = f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
        try:
            self._interpreter = interpreters.Interpreter(model_path=str(file), num_threads=threads_for(threads) or None)
            self.signatures = tuple(self._interpreter.get_signature_list())
            if DECODE not in self.signatures:
                raise ArtifactError(f"{file}: no signature '{DECODE}'", hint="export the model again")
            decode = self._interpreter.get_signature_runner(DECODE)
            details, outputs = decode.get_input_details(), decode.get_output_details()
            # LiteRT gives access to the tensors of `decode`, the first subgraph, only while no signature runner exists.
            del decode
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError, OSError) as error:
            raise cannot_load(file, "LiteRT", error) from error
        self.inputs: Mapping[str, InputSpec] = {
            name: InputSpec(tuple(item["shape"]), np.dtype(item["dtype"])) for name, item in details.items()
        }
        self._read = {name: int(item["index"]) for name, item in details.items()}
        self._written = {name: int(item["index"]) for name, item in outputs.items()}
        self._states = tuple(name for name in details if name.startswith(STATE_PREFIXES))

    def reset(self) -> None:
        """Fill the states with zeros."""
        for name in self._states:
            self._view(self._read[name]).fill(0)

    def run(self, signature: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run one signature; see `Engine`."""
        return self._decode(feeds) if signature == DECODE else self._prefill(signature, feeds)

    def _decode(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        for name, value in feeds.items():
            self._interpreter.set_tensor(self._read[name], value)
        self._interpreter.invoke()
        for name in self._states:
            np.copyto(self._view(self._read[name]), self._view(self._written[name]))
        logits: np.ndarray = self._interpreter.get_tensor(self._written["logits"])
        return logits

    def _prefill(self, signature: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        states = {name: self._view(self._read[name]) for name in self._states}
        results = self._interpreter.get_signature_runner(signature)(**feeds, **states)
        for name in self._states:
            np.copyto(states[name], results[name])
        logits: np.ndarray = results["logits"]
        return logits

    def _view(self, index: int) -> np.ndarray:
        """A view of a tensor of `decode` in LiteRT's memory, such as a state. It must not be kept during a run."""
        view: np.ndarray = self._interpreter.tensor(index)()
        return view
