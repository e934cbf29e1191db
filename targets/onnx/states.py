"""What a session of ONNX Runtime keeps between two steps: tensors that grow, or buffers that are written in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
LEAST = 256
"""Tokens that a buffer holds at first; it doubles when it is full."""


class States(Protocol):
    """What a session remembers of its sequences.

    Attributes:
        length: Tokens of each sequence so far.
    """

    length: int

    def reset(self) -> None:
        """Forget them."""

    def run(self, feeds: Mapping[str, Any], batch: int, new: int) -> np.ndarray:
        """One step of `new` tokens for each of `batch` sequences.

        Args:
            feeds: OrtValues of all inputs but the states.
            batch: Number of sequences.
            new: Tokens of each.

        Returns:
            logits [batch, new, vocabulary].
        """


def presents(session: Any) -> dict[str, str]:
    """Inputs of the session that are states, with the outputs that replace them.

    past_key_values.0.key -> present.0.key, past_conv.0 -> present_conv.0.
    """
    outputs = {spec.name for spec in session.get_outputs()}
    named = {spec.name: spec.name.replace("past_key_values", "past") for spec in session.get_inputs()}
    replaced = {name: "present" + short.removeprefix("past") for name, short in named.items()}
    return {name: present for name, present in replaced.items() if present in outputs}


def zeros(spec: Any, batch: int, length: int) -> np.ndarray:
    """Zeros for the state `spec`: the batch comes first, and another axis without a number is that of the tokens."""
    sizes = (size if isinstance(size, int) else length for size in spec.shape[1:])
    return np.zeros((batch, *sizes), NUMPY[spec.type])


def is_fixed(spec: Any) -> bool:
    """Whether the size of the state `spec` does not depend on the tokens so far."""
    return all(isinstance(size, int) for size in spec.shape[1:])


class Growing:
    """Every step returns its states anew, longer by the new tokens."""

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


class Shared:
    """Past and present of a layer are one buffer, longer than the sequence: a step writes its own tokens alone.

    A state that a step replaces as a whole has two, which change places: a kernel may still read the one that it reads.
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
        self.capacity = max(LEAST, 2 * self.capacity, length)
        self.binding = self.session.io_binding()
        for spec in self.specs:
            buffer = zeros(spec, batch, self.capacity)
            if self.length:
                buffer[:, :, : self.length] = self.buffers[spec.name][:, :, : self.length]
            self.buffers[spec.name] = buffer
            value = ort.OrtValue.ortvalue_from_numpy(buffer)  # on CPU it is this memory, not a copy of it
            self.binding.bind_ortvalue_input(spec.name, value)
            self.binding.bind_ortvalue_output(self.presents[spec.name], value)
