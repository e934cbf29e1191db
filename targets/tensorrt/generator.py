"""The Runner of the TensorRT target on a GPU, with buffers at fixed addresses.

The KV cache of a layer is one buffer of `context` slots, filled from its end. A decode step attends to all of it, with
empty slots masked, so that shapes and addresses are the same at every step, as CUDA graphs need. A step returns a cache
that is longer by its new tokens, and the last `context` slots of it are copied back. A state of another kind has a
fixed size; it starts as zeros and is copied back as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moec.compiler.common.errors import UsageError
from moec.targets.common.added_inputs import rows
from moec.targets.runners import Runner, RunnerLimits
from moec.targets.tensorrt.settings import EngineSettings

NUMPY: Mapping[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


@dataclass(frozen=True)
class Rows:
    """Rows of memory: address of the first one, and bytes from one row to the next (pitch)."""

    address: int
    pitch: int


class Session(Protocol):
    """An engine loaded on a GPU. Addresses are in the GPU's memory; calls are executed in order."""

    def allocate(self, nbytes: int) -> int:
        """Allocate zeroed memory on the GPU; returns its address."""

    def write(self, address: int, array: np.ndarray) -> None:
        """Copy `array` to the GPU."""

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Copy an array from the GPU after all earlier work has finished."""

    def copy_rows(self, source: Rows, destination: Rows, width: int, count: int) -> None:
        """Copy `count` rows of `width` bytes within the GPU's memory."""

    def execute(self, profile: str, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Run the engine with the shapes of its inputs and the addresses of its inputs and outputs."""

    def facts(self) -> Mapping[str, Any]:
        """Library, GPU and versions."""


@dataclass(frozen=True)
class State:
    """One state: names of its input and output, shape and dtype.

    A KV cache has the shape [batch_size, heads, past_sequence_length, head size].
    """

    source: str
    result: str
    sizes: tuple[int | str, ...]
    dtype: Any

    @property
    def grows(self) -> bool:
        """Whether it grows with the tokens, as a KV cache does."""
        return "past_sequence_length" in self.sizes

    def shape(self, batch: int, past: int) -> tuple[int, ...]:
        """Its shape for `batch` sequences of `past` tokens."""
        lengths = {"batch_size": batch, "past_sequence_length": past}
        return tuple(lengths[size] if isinstance(size, str) else size for size in self.sizes)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of an array of `shape` in its dtype."""
        return int(np.prod(shape, dtype=np.int64)) * int(np.dtype(self.dtype).itemsize)


class EngineRunner(Runner):
    """Runs an engine; see `moec.targets.runners.Runner`.

    Args:
        session: The engine on a GPU.
        settings: Contents of `tensorrt.json`.
        signature: The signature in moec.json.
    """

    def __init__(self, session: Session, settings: EngineSettings, signature: Mapping[str, Any]) -> None:
        self._session, self._context = session, settings.context
        self._batch, self._piece = settings.batch, settings.piece
        self._states = [_state(row) for row in signature["states"]]
        self._inputs = {row["name"]: NUMPY[row["dtype"]] for row in signature["inputs"]}
        self._vocabulary = int(signature["outputs"][0]["shape"][-1])
        self._addresses = self._allocate(signature)
        self._defaults: Mapping[str, list[float]] = settings.input_defaults
        self._widths: Mapping[str, int] = settings.token_inputs
        self.overrides: dict[str, np.ndarray] = {}
        """See `moec.targets.runners.AdjustableRunner`."""
        self._mask = np.zeros((0, 0), np.int64)
        self.limits = RunnerLimits(max_batch=self._batch, max_sequence=self._context, repeats_bits=False)

    def _allocate(self, signature: Mapping[str, Any]) -> dict[str, int]:
        longest = self._context + self._piece
        lengths = {
            "batch_size": self._batch,
            "sequence_length": self._piece,
            "past_sequence_length": self._context,
            "total_sequence_length": longest,
        }
        rows = [*signature["inputs"], *signature["outputs"]]
        rows += [state[end] for state in signature["states"] for end in ("input", "output")]
        addresses = {}
        for row in rows:
            sizes = [size if isinstance(size, int) else lengths[size] for size in row["shape"]]
            nbytes = int(np.prod(sizes, dtype=np.int64)) * int(np.dtype(NUMPY[row["dtype"]]).itemsize)
            addresses[row["name"]] = self._session.allocate(max(nbytes, 1))
        return addresses

    def reset(self) -> None:
        """Drop all sequences and their states."""
        self._mask = np.zeros((0, 0), np.int64)
        for state in self._states:
            if not state.grows:
                self._session.write(self._addresses[state.source], np.zeros(state.shape(self._batch, 0), state.dtype))

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue the sequences; see `moec.targets.runners.Runner`.

        Raises:
            UsageError: The sequence is longer than the KV cache, or the batch larger than that of the engine.
        """
        batch, length = input_ids.shape
        start = self._mask.shape[1]
        if start + length > self._context or batch > self._batch:
            raise UsageError(
                f"{batch} sequences of {start + length} tokens: the engine holds {self._batch} of {self._context}",
                hint="export with a larger --context or --batch",
            )
        whole = np.ones((batch, start + length), np.int64) if attention_mask is None else attention_mask
        for name, default in self._defaults.items():
            self._write(name, np.asarray(self.overrides.get(name, default)))
        given, logits = rows(self._widths, self.overrides, batch, length), []
        for first in range(0, length, self._piece):
            last = min(first + self._piece, length)
            added = {name: array[:, first:last] for name, array in given.items()}
            logits.append(self._step(input_ids[:, first:last], whole[:, : start + last].astype(np.int64), added))
        return np.concatenate(logits, axis=1)

    def _write(self, name: str, array: np.ndarray) -> None:
        self._session.write(self._addresses[name], np.ascontiguousarray(array, self._inputs[name]))

    def _step(self, ids: np.ndarray, mask: np.ndarray, added: Mapping[str, np.ndarray]) -> np.ndarray:
        """One call of the engine: ids [B, S], mask [B, past + S], and added inputs; returns logits."""
        batch, length = ids.shape
        start = self._mask.shape[1]
        # Without past tokens, the engine gets an empty cache; later it gets the whole buffer, empty slots included.
        past = self._context if start else 0
        padded = np.concatenate([np.zeros((batch, past - start), np.int64), mask], axis=1) if past else mask
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -length:]
        shapes = {}
        feeds = {"input_ids": ids, "attention_mask": padded, "position_ids": positions, **added}
        for name, array in feeds.items():
            if name in self._inputs:
                self._write(name, array)
                shapes[name] = tuple(array.shape)
        for state in self._states:
            shapes[state.source] = state.shape(batch, past)
        self._session.execute("decode" if length == 1 and past else "prefill", shapes, self._addresses)
        for state in self._states:
            self._keep(state, batch, past + length)
        self._mask = mask
        return self._session.read(self._addresses["logits"], (batch, length, self._vocabulary), np.float32)

    def _keep(self, state: State, batch: int, slots: int) -> None:
        """Copy the last `slots` slots of a returned cache to the end of its buffer; copy other states as a whole."""
        shape = state.shape(batch, slots)
        if not state.grows:
            size = state.nbytes(shape)
            whole, home = (Rows(self._addresses[name], size) for name in (state.result, state.source))
            self._session.copy_rows(whole, home, size, 1)
            return
        kept, size = min(slots, self._context), state.nbytes(shape[3:])
        source = Rows(self._addresses[state.result] + (slots - kept) * size, slots * size)
        target = Rows(self._addresses[state.source] + (self._context - kept) * size, self._context * size)
        self._session.copy_rows(source, target, kept * size, batch * shape[1])

    def facts(self) -> Mapping[str, Any]:
        """Library, GPU and sizes."""
        return {**self._session.facts(), "context": self._context, "batch": self._batch}


def _state(row: Mapping[str, Any]) -> State:
    source, result = row["input"], row["output"]
    return State(source["name"], result["name"], tuple(source["shape"]), NUMPY[source["dtype"]])
