"""The states of a session between steps: tensors that grow with the tokens, or buffers that are written in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
INITIAL_CAPACITY = 256
"""Initial capacity of a buffer in tokens; a full buffer is doubled."""


class States(Protocol):
    """The states of a session's sequences.

    Attributes:
        length: Number of tokens of each sequence so far.
    """

    length: int

    def reset(self) -> None:
        """Drop all sequences."""

    def run(self, feeds: Mapping[str, Any], batch: int, new: int) -> np.ndarray:
        """One step of `new` tokens for each of `batch` sequences.

        Args:
            feeds: OrtValues of all inputs except the states.
            batch: Number of sequences.
            new: Number of new tokens per sequence.

        Returns:
                Logits [batch, new, vocabulary].
        """


def presents(session: Any) -> dict[str, str]:
    """Input name of each state -> name of the output that replaces it.

    Examples: past_key_values.0.key -> present.0.key, past_conv.0 -> present_conv.0.
    """
    outputs = {spec.name for spec in session.get_outputs()}
    named = {spec.name: spec.name.replace("past_key_values", "past") for spec in session.get_inputs()}
    replaced = {name: "present" + short.removeprefix("past") for name, short in named.items()}
    return {name: present for name, present in replaced.items() if present in outputs}


def zeros(spec: Any, batch: int, length: int) -> np.ndarray:
    """Zeros for the state `spec`: axis 0 has length `batch`; any other dynamic axis counts tokens and has `length`."""
    sizes = (size if isinstance(size, int) else length for size in spec.shape[1:])
    return np.zeros((batch, *sizes), NUMPY[spec.type])


def is_fixed(spec: Any) -> bool:
    """Whether the size of the state `spec` is independent of the number of tokens."""
    return all(isinstance(size, int) for size in spec.shape[1:])


class GrowingStates:
    """States that each step returns as new tensors, longer by the new tokens."""

    def __init__(self, session: Any) -> None:
        self.session, self.presents = session, presents(session)
        self.specs = [spec for spec in session.get_inputs() if spec.name in self.presents]
        self.outputs = [spec.name for spec in session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        self.length, self.values = 0, dict[str, Any]()

    def run(self, feeds: Mapping[str, Any], batch: int, new: int) -> np.ndarray:
        """See `States.run`."""
        first = ort.OrtValue.ortvalue_from_numpy
        states = self.values or {spec.name: first(zeros(spec, batch, 0)) for spec in self.specs}
        results = self.session.run_with_ort_values(self.outputs, {**feeds, **states})
        named = dict(zip(self.outputs, results, strict=True))
        self.values = {name: named[present] for name, present in self.presents.items()}
        self.length += new
        logits: np.ndarray = named["logits"].numpy()
        return logits


class SharedBufferStates:
    """Caches in buffers longer than the sequence: past and present share one, and a step writes only its own tokens.

    A state that each step replaces as a whole has two buffers that are swapped, since a kernel may read the old state
    while it writes the new one.
    """

    def __init__(self, session: Any) -> None:
        self.session, self.presents = session, presents(session)
        states = [spec for spec in session.get_inputs() if spec.name in self.presents]
        self.specs = [spec for spec in states if not is_fixed(spec)]
        self.fixed = [spec for spec in states if is_fixed(spec)]
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        self.length, self.capacity, self.buffers = 0, 0, dict[str, np.ndarray]()
        self.pairs = dict[str, tuple[Any, Any]]()
        self.binding = self.session.io_binding()

    def run(self, feeds: Mapping[str, Any], batch: int, new: int) -> np.ndarray:
        """See `States.run`."""
        if self.length + new > self.capacity:
            self._grow(batch, self.length + new)
        for name, value in feeds.items():
            self.binding.bind_ortvalue_input(name, value)
        for spec in self.fixed:
            read, written = self.pairs.get(spec.name) or self._pair(spec, batch)
            self.binding.bind_ortvalue_input(spec.name, read)
            self.binding.bind_ortvalue_output(self.presents[spec.name], written)
            self.pairs[spec.name] = written, read
        self.binding.bind_output("logits")
        self.session.run_with_iobinding(self.binding)
        self.length += new
        logits: np.ndarray = self.binding.get_outputs()[-1].numpy()
        return logits

    def _pair(self, spec: Any, batch: int) -> tuple[Any, Any]:
        first, second = (ort.OrtValue.ortvalue_from_numpy(zeros(spec, batch, 0)) for _ in range(2))
        return first, second

    def _grow(self, batch: int, length: int) -> None:
        self.capacity = max(INITIAL_CAPACITY, 2 * self.capacity, length)
        self.binding = self.session.io_binding()
        for spec in self.specs:
            buffer = zeros(spec, batch, self.capacity)
            if self.length:
                buffer[:, :, : self.length] = self.buffers[spec.name][:, :, : self.length]
            self.buffers[spec.name] = buffer
            value = ort.OrtValue.ortvalue_from_numpy(buffer)  # on CPU it shares the memory of `buffer`
            self.binding.bind_ortvalue_input(spec.name, value)
            self.binding.bind_ortvalue_output(self.presents[spec.name], value)
