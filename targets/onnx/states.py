"""The states of a session between steps: tensors that grow with the tokens, or buffers that are written in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
}
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

    def run(self, feeds: Mapping[str, Any], batch: int, new: int) -> dict[str, np.ndarray]:
        """One step of `new` tokens for each of `batch` sequences.

        Args:
            feeds: OrtValues of all inputs except the states.
            batch: Number of sequences.
            new: Number of new tokens per sequence.

        Returns:
            The outputs that are no states, such as `logits` [batch, new, vocabulary].
        """

    def gather(self, rows: Sequence[StateRow]) -> tuple[int, ...]:
        """Drop all sequences and take copies of others.

        Args:
            rows: The sequences, of these states or of others for the same session.

        Returns:
            Number of slots of left padding of each.
        """

    def current(self, name: str) -> np.ndarray:
        """The state that goes into the input `name`: axis 0 is the batch; token axes may be longer than `length`."""


@dataclass(frozen=True)
class StateRow:
    """One sequence in the states of a session.

    Attributes:
        states: The states.
        index: Its row in their batch.
        padding: Number of slots of left padding before its first token.
    """

    states: States
    index: int
    padding: int

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return self.states.length - self.padding


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


def aligned(rows: Sequence[StateRow]) -> tuple[int, tuple[int, ...]]:
    """Number of tokens of the longest of `rows`, and the left padding that each needs to be as long."""
    longest = max(row.length for row in rows)
    return longest, tuple(longest - row.length for row in rows)


def gathered(specs: Sequence[Any], rows: Sequence[StateRow], capacity: int) -> Iterator[tuple[Any, np.ndarray]]:
    """The states `specs` of several sequences in one batch, one after another.

    All sequences end in the slot of the longest, so the shorter ones have left padding.

    Args:
        specs: Inputs of the session.
        rows: The sequences, at least one.
        capacity: Length of the token axis of the results, at least that of the longest sequence.

    Yields:
        Each spec with its array.
    """
    longest, _ = aligned(rows)
    for spec in specs:
        array = zeros(spec, len(rows), capacity)
        held = {id(row.states): row.states.current(spec.name) for row in rows}
        for index, row in enumerate(rows):
            source, target = held[id(row.states)][row.index], array[index]
            if not is_fixed(spec):
                source = _tokens(spec, source, row.padding, row.padding + row.length)
                target = _tokens(spec, target, longest - row.length, longest)
            target[...] = source
        yield spec, array


def _tokens(spec: Any, array: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A view of slots `start` to `stop` of one sequence in the state `spec`."""
    axis = next(axis for axis, size in enumerate(spec.shape[1:]) if not isinstance(size, int))
    return array[(*(slice(None),) * axis, slice(start, stop))]


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

    def run(self, feeds: Mapping[str, Any], batch: int, new: int) -> dict[str, np.ndarray]:
        """See `States.run`."""
        first = ort.OrtValue.ortvalue_from_numpy
        states = self.values or {spec.name: first(zeros(spec, batch, 0)) for spec in self.specs}
        results = self.session.run_with_ort_values(self.outputs, {**feeds, **states})
        named = dict(zip(self.outputs, results, strict=True))
        self.values = {name: named[present] for name, present in self.presents.items()}
        self.length += new
        returned = set(self.presents.values())
        return {name: value.numpy() for name, value in named.items() if name not in returned}

    def gather(self, rows: Sequence[StateRow]) -> tuple[int, ...]:
        """See `States.gather`."""
        longest, paddings = aligned(rows)
        value = ort.OrtValue.ortvalue_from_numpy
        self.values = {spec.name: value(array) for spec, array in gathered(self.specs, rows, longest)}
        self.length = longest
        return paddings

    def current(self, name: str) -> np.ndarray:
        """See `States.current`."""
        array: np.ndarray = self.values[name].numpy()
        return array


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
        returned = set(self.presents.values())
        self.others = [spec.name for spec in session.get_outputs() if spec.name not in returned]
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        self.length, self.capacity, self.buffers = 0, 0, dict[str, np.ndarray]()
        self.pairs = dict[str, tuple[Any, Any]]()
        self.binding = self.session.io_binding()

    def run(self, feeds: Mapping[str, Any], batch: int, new: int) -> dict[str, np.ndarray]:
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
        for name in self.others:
            self.binding.bind_output(name)
        self.session.run_with_iobinding(self.binding)
        self.length += new
        last = self.binding.get_outputs()[-len(self.others) :]
        return {name: value.numpy() for name, value in zip(self.others, last, strict=True)}

    def _pair(self, spec: Any, batch: int) -> tuple[Any, Any]:
        first, second = (ort.OrtValue.ortvalue_from_numpy(zeros(spec, batch, 0)) for _ in range(2))
        return first, second

    def _grow(self, batch: int, length: int) -> None:
        self._renew(max(INITIAL_CAPACITY, 2 * self.capacity, length))
        for spec in self.specs:
            buffer = zeros(spec, batch, self.capacity)
            if self.length:
                buffer[:, :, : self.length] = self.buffers[spec.name][:, :, : self.length]
            self._bind(spec, buffer)

    def _renew(self, capacity: int) -> None:
        self.capacity, self.binding = capacity, self.session.io_binding()

    def _bind(self, spec: Any, buffer: np.ndarray) -> None:
        self.buffers[spec.name] = buffer
        value = ort.OrtValue.ortvalue_from_numpy(buffer)  # on CPU it shares the memory of `buffer`
        self.binding.bind_ortvalue_input(spec.name, value)
        self.binding.bind_ortvalue_output(self.presents[spec.name], value)

    def gather(self, rows: Sequence[StateRow]) -> tuple[int, ...]:
        """See `States.gather`."""
        longest, paddings = aligned(rows)
        capacity = max(INITIAL_CAPACITY, 2 * longest)
        buffers = list(gathered(self.specs, rows, capacity))
        replaced = list(gathered(self.fixed, rows, 0))
        self._renew(capacity)
        for spec, buffer in buffers:
            self._bind(spec, buffer)
        for spec, array in replaced:
            read, written = (ort.OrtValue.ortvalue_from_numpy(each) for each in (array, np.zeros_like(array)))
            self.pairs[spec.name] = read, written
        self.length = longest
        return paddings

    def current(self, name: str) -> np.ndarray:
        """See `States.current`."""
        array: np.ndarray = self.pairs[name][0].numpy() if name in self.pairs else self.buffers[name]
        return array
