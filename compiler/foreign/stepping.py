"""Runs a file whose states are inputs and outputs, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.compiler.foreign.binding import Binding
from moec.targets.model_files import Port
from moec.targets.runners import Runner, RunnerLimits

Feeds = dict[str, np.ndarray]
Call = Callable[[Feeds], Mapping[str, np.ndarray]]
"""All inputs of a file -> all its outputs."""


class SteppingRunner(Runner):
    """The Runner of a file that is a function of tokens and states.

    Some files return the logits of the last token alone. Such a step is run as a whole, for its last logits and its
    states, and beside it token by token from the same states, for the logits in between. Files without states get the
    whole sequence in every step.

    Args:
        call: Runs the file once.
        binding: What its inputs and outputs are.
        facts: Runtime, version and threads, for the report.
        max_sequence: Maximum number of tokens per sequence, or None.
    """

    def __init__(
        self, call: Call, binding: Binding, facts: Mapping[str, Any], *, max_sequence: int | None = None
    ) -> None:
        self._call, self._binding, self._facts = call, binding, facts
        buffers = [state.buffer for state in binding.states if state.buffer is not None]
        fixed = binding.ids.shape[-1] if binding.whole else None
        lengths = [length for length in (max_sequence, fixed, *buffers) if length is not None]
        self.limits = RunnerLimits(max_batch=1, padding=False, max_sequence=min(lengths, default=None))
        self._last_only = False
        self.reset()

    def reset(self) -> None:
        """Drop the sequence and its states."""
        self._length, self._ids = 0, np.zeros((1, 0), np.int64)
        self._states = {state.input: np.zeros(state.shape, state.dtype) for state in self._binding.states}

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue the sequence; see `moec.targets.runners.Runner`."""
        self.limits.check(self._facts["format"], input_ids, attention_mask, self._length)
        tokens = input_ids.shape[1]
        if self._binding.whole:
            return self._with_whole_sequence(input_ids)
        logits, states = self._step(input_ids, self._states, self._length)
        if logits.shape[1] != tokens:
            self._last_only = True
            logits = np.concatenate([*self._one_by_one(input_ids[:, :-1]), logits[:, -1:]], axis=1)
        self._states, self._length = states, self._length + tokens
        return logits

    def _with_whole_sequence(self, input_ids: np.ndarray) -> np.ndarray:
        """The logits of new tokens of a file without states. A fixed length is filled up, which no token sees."""
        self._ids = np.concatenate([self._ids, input_ids], axis=1)
        self._length = self._ids.shape[1]
        fixed = self._binding.ids.shape[-1] or self._length
        given = np.pad(self._ids, [(0, 0), (0, fixed - self._length)])
        logits, _ = self._step(given, {}, 0)
        if logits.shape[1] != fixed:
            raise ArtifactError(
                f"{self._binding.logits.name} has the logits of {logits.shape[1]} tokens of a sequence of {fixed}",
                hint="a file without states must return those of every token; export it with states",
            )
        return logits[:, self._length - input_ids.shape[1] : self._length]

    def _one_by_one(self, input_ids: np.ndarray) -> list[np.ndarray]:
        """The logits of each token, fed alone; the states of the sequence are left as they are."""
        states, found = self._states, list[np.ndarray]()
        for index in range(input_ids.shape[1]):
            logits, states = self._step(input_ids[:, index : index + 1], states, self._length + index)
            found.append(logits)
        return found

    def _step(self, ids: np.ndarray, states: Feeds, past: int) -> tuple[np.ndarray, Feeds]:
        """Logits [1, S or 1, V] float32 and the new states after `ids` [1, S] int64."""
        own = self._binding
        results = self._call(feeds(own, ids, past) | states)
        logits = np.asarray(results[own.logits.name], dtype=np.float32)
        logits = logits.reshape(1, -1, logits.shape[-1])
        return logits, {state.input: results[state.output] for state in own.states}

    def facts(self) -> Mapping[str, Any]:
        """Runtime, its version and threads, and whether the file returns the last logits alone."""
        kept = {"states": "none, every step gets the whole sequence"} if self._binding.whole else {}
        return {**self._facts, **kept, **({"logits": "of the last token alone"} if self._last_only else {})}


def feeds(binding: Binding, ids: np.ndarray, past: int) -> Feeds:
    """The inputs of one step of `ids` [1, S] after `past` tokens, but for the states."""
    length = ids.shape[1]
    found = {binding.ids.name: ids.reshape(_rank(binding.ids, ids)).astype(binding.ids.dtype)}
    if binding.mask is not None:
        own = (state.buffer for state in binding.states if state.buffer is not None)
        buffer = next(own, binding.mask.shape[-1])
        found[binding.mask.name] = _mask(binding.mask, length, past, buffer)
    if binding.positions is not None:
        found[binding.positions.name] = _positions(binding.positions, length, past)
    for name, (port, value) in binding.constants.items():
        found[name] = np.full([1 if size is None else size for size in port.shape], value, port.dtype)
    return found


def _rank(port: Port, ids: np.ndarray) -> tuple[int, ...]:
    return ids.shape if len(port.shape) == 2 else (ids.size,)


def _positions(port: Port, length: int, past: int) -> np.ndarray:
    """Positions [S], [1, S], or [n, 1, S] where a model has one for each axis of an image."""
    positions = np.arange(past, past + length, dtype=port.dtype)
    leading = [1 if size is None else size for size in port.shape[:-1]]
    return np.ascontiguousarray(np.broadcast_to(positions, (*leading, length)))


def _mask(port: Port, length: int, past: int, buffer: int | None) -> np.ndarray:
    """A mask of all tokens [1, past + S], or of what each token sees, [1, 1, S, past + S or the length of the buffer].

    The second kind is True or 0 where a token sees another, and False or a large negative number elsewhere.
    """
    if len(port.shape) == 2:
        return np.ones((1, past + length), port.dtype)
    total = buffer if buffer is not None else past + length
    seen = np.arange(total)[None, :] <= past + np.arange(length)[:, None]
    if port.dtype.kind == "f":
        seen = np.where(seen, 0, np.finfo(port.dtype).min)
    return seen.astype(port.dtype).reshape(1, 1, length, total)
