"""The Core ML states of a model: KV caches, last inputs of convolutions, and states of linear attention.

A Core ML state is an fp16 tensor of fixed shape that outlives a prediction. If all layers have equal shapes, there are
`keyCache` and `valueCache` [layers, heads, context, head size], `convState` [layers, channels, kernel size] and
`recurrentState` [layers, heads, key width, value width]; otherwise each layer has its own states.

A state that is fp32 in the Program is stored as the sum of two fp16 states: the value rounded to fp16, and the
remainder, scaled up so that it does not underflow. Together they hold 22 bits. All states of fp32 models and the states
of linear attention in all models are stored in this way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moec.compiler.ir.program import Program, StateSpec
from moec.targets.common.refusals import RefusedError
from moec.targets.coreml.context import Context, Var

CACHES: Mapping[str, str] = {"key": "keyCache", "value": "valueCache"}
BASES: Mapping[str, str] = {**CACHES, "index_key": "indexKeyCache", "conv": "convState", "recurrent": "recurrentState"}
"""Kind of state (see `moec.compiler.ir.program.StateSpec`) -> name of the Core ML state."""
REMAINDER = "Remainder"
REMAINDER_SCALE = 2048.0
"""The remainder of rounding to fp16 is below 2^-11 of the value."""


@dataclass(frozen=True)
class StateLocation:
    """Where a layer's state is stored.

    Attributes:
        state: Name of the Core ML state.
        shape: Shape of the Core ML state.
        index: Index of the layer along axis 0 of the Core ML state.
        split: Whether a second Core ML state holds the remainder of rounding to fp16.
    """

    state: str
    shape: tuple[int, ...]
    index: int
    split: bool


@dataclass(frozen=True)
class StateLayout:
    """Where all states of a Program are stored.

    Attributes:
        locations: Name of each input state of the Program -> where it is stored.
        context: Tokens that the KV cache holds.
    """

    locations: Mapping[str, StateLocation]
    context: int

    def states(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every Core ML state of the model, in the order of the layers."""
        found: dict[str, tuple[int, ...]] = {}
        for location in self.locations.values():
            found[location.state] = location.shape
            if location.split:
                found[location.state + REMAINDER] = location.shape
        return found


def state_layout(program: Program, context: int) -> StateLayout:
    """Lay out the states of `program` for `context` tokens.

    Raises:
        LoweringError: A state is of a kind that is not supported here.
    """
    shapes = {state.input.name: _shape(state, context) for state in program.states}
    counts = Counter((state.kind, shapes[state.input.name]) for state in program.states)
    # Keys and values have the same layout: one state for all layers only if the shapes of both are equal in all.
    differing = {kind for kind, count in Counter(kind for kind, _ in counts).items() if count > 1}
    apart = differing | (set(CACHES) if differing & set(CACHES) else set())
    places: Counter[str] = Counter()
    locations: dict[str, StateLocation] = {}
    for state in program.states:
        base, shape, split = BASES[state.kind], shapes[state.input.name], state.input.dtype is torch.float32
        if state.kind in apart:
            locations[state.input.name] = StateLocation(f"{base}{state.layer}", (1, *shape), 0, split)
        else:
            locations[state.input.name] = StateLocation(base, (counts[state.kind, shape], *shape), places[base], split)
            places[base] += 1
    return StateLayout(locations, context)


def _shape(state: StateSpec, context: int) -> tuple[int, ...]:
    """Shape of one layer's state, without the batch."""
    if state.kind not in BASES:
        kinds = ", ".join(BASES)
        reason = f"a state of kind {state.kind} is not supported here; layers may keep states of the kinds {kinds}"
        raise RefusedError(f"layer {state.layer}", reason)
    return tuple(context if size == "past_sequence" else int(size) for size in state.input.shape[1:])


class States:
    """Reads and writes the states of one function.

    Args:
        ctx: The function's context.
        layout: Where the states are stored.
        states: Name of a Core ML state -> input of the function.
        start: Slot of the first new token, int32 [1].
        stop: Slot after that of the last new token, int32 [1].
    """

    def __init__(self, ctx: Context, layout: StateLayout, states: Mapping[str, Any], start: Var, stop: Var) -> None:
        self._ctx, self._layout, self._states = ctx, layout, states
        self._start, self._stop = start, stop
        self._current: dict[str, Var] = {}

    def update(self, name: str, new: Var) -> Var:
        """Write the new keys or values of a layer and return the whole cache of the layer.

        Args:
            name: Input state of the Program.
            new: The new keys or values [1, heads, S, head size].

        Returns:
            [1, heads, context, head size]; slots after the last token hold arbitrary finite values.
        """
        location = self._layout.locations[name]
        return self._joined(self._write(location, state, part) for state, part in self._parts(location, new))

    def read(self, name: str) -> Var:
        """The current value of a state that steps replace as a whole, such as [1, channels, kernel size]."""
        location = self._layout.locations[name]
        return self._joined(self._layer(location, self._content(state)) for state in self._names(location))

    def replace(self, present: Mapping[str, Var]) -> None:
        """Write all states that steps replace as a whole. A Core ML state that several layers share is written once.

        Args:
            present: Name of each such input state, in the Program's order -> its new value.
        """
        ctx, mb, layers = self._ctx, self._ctx.mb, dict[str, list[Var]]()
        for name, new in present.items():
            location = self._layout.locations[name]
            # coremltools infers a symbolic size for the last elements of a symbolic number of tokens.
            fixed = mb.reshape(x=new, shape=ctx.ints(1, *location.shape[1:]))
            for state, part in self._parts(location, fixed):
                layers.setdefault(state, []).append(part)
        for state, parts in layers.items():
            value = parts[0] if len(parts) == 1 else mb.concat(values=parts, axis=ctx.constant(np.int32(0)))
            mb.coreml_update_state(state=self._states[state], value=value)

    def _names(self, location: StateLocation) -> tuple[str, ...]:
        return (location.state, location.state + REMAINDER) if location.split else (location.state,)

    def _parts(self, location: StateLocation, new: Var) -> Iterator[tuple[str, Var]]:
        """The Core ML states that hold a value, each with its part of the value."""
        ctx, mb = self._ctx, self._ctx.mb
        rounded = ctx.cast(new, "fp16")
        yield location.state, rounded
        if location.split:
            rest = mb.sub(x=new, y=ctx.cast(rounded, "fp32"))
            scaled = mb.mul(x=rest, y=ctx.constant(np.float32(REMAINDER_SCALE)))
            yield location.state + REMAINDER, ctx.cast(scaled, "fp16")

    def _joined(self, parts: Iterable[Var]) -> Var:
        """The value, computed from its parts in the Core ML states."""
        ctx, mb, held = self._ctx, self._ctx.mb, list(parts)
        if len(held) == 1:
            return held[0]
        high, low = (ctx.cast(part, "fp32") for part in held)
        return mb.add(x=high, y=mb.mul(x=low, y=ctx.constant(np.float32(1 / REMAINDER_SCALE))))

    def _content(self, state: str) -> Var:
        if state not in self._current:
            self._current[state] = self._ctx.mb.read_state(input=self._states[state])
        return self._current[state]

    def _write(self, location: StateLocation, state: str, new: Var) -> Var:
        ctx, mb = self._ctx, self._ctx.mb
        _, heads, _, width = location.shape
        before = self._content(state)
        axis = ctx.constant(np.int32(0))
        begin = ctx.shared(
            ("cache begin", location.index),
            lambda: mb.concat(values=[ctx.ints(location.index, 0), self._start, ctx.ints(0)], axis=axis),
        )
        end = ctx.shared(
            ("cache end", location.index, heads, width),
            lambda: mb.concat(values=[ctx.ints(location.index + 1, heads), self._stop, ctx.ints(width)], axis=axis),
        )
        changed = mb.slice_update(x=before, update=new, begin=begin, end=end)
        kept = mb.coreml_update_state(state=self._states[state], value=changed)
        self._current[state] = kept
        return self._layer(location, kept)

    def _layer(self, location: StateLocation, content: Var) -> Var:
        """One layer's part of a Core ML state."""
        ctx, (layers, *sizes) = self._ctx, location.shape
        if layers == 1:
            return content
        begin = ctx.ints(location.index, *[0] * len(sizes))
        return ctx.mb.slice_by_index(x=content, begin=begin, end=ctx.ints(location.index + 1, *sizes))
