"""What a step hands to the next one as Core ML states: key-value caches, last inputs of convolutions, states of scans.

A state is a tensor of fixed shape that outlives a prediction; Core ML takes fp16 alone. When all layers agree there are
`keyCache` and `valueCache` [layers, heads, context, width], `convState` [layers, channels, kernel size] and
`recurrentState` [layers, heads, key width, value width]; else each layer has its own. A state that is fp32 in the
Program, as all are where it computes in fp32 and those of scans always, is the sum of two: the value rounded to fp16,
and what that left, scaled up so that it does not vanish. Together they hold 22 bits.
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
"""Names of the states by kind of state, see `moec.compiler.ir.program.StateSpec`."""
REMAINDER = "Remainder"
REMAINDER_SCALE = 2048.0
"""The remainder of rounding to fp16 is below 2^-11 of the value."""


@dataclass(frozen=True)
class Slot:
    """Where a state of a layer is.

    Attributes:
        state: Name of the state.
        shape: Shape of the state.
        index: Place of the layer along axis 0 of the state.
        split: Whether each value is the sum of two states.
    """

    state: str
    shape: tuple[int, ...]
    index: int
    split: bool


@dataclass(frozen=True)
class StateLayout:
    """Which state holds what.

    Attributes:
        slots: Name of each input state of the Program -> its place.
        context: Tokens that the cache holds.
    """

    slots: Mapping[str, Slot]
    context: int

    def states(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every state of the model, in the order of the layers."""
        found: dict[str, tuple[int, ...]] = {}
        for slot in self.slots.values():
            found[slot.state] = slot.shape
            if slot.split:
                found[slot.state + REMAINDER] = slot.shape
        return found


def state_layout(program: Program, context: int) -> StateLayout:
    """Lay out the states of `program` for `context` tokens.

    Raises:
        LoweringError: A state is of a kind that is not supported here.
    """
    shapes = {state.input.name: _shape(state, context) for state in program.states}
    counts = Counter((state.kind, shapes[state.input.name]) for state in program.states)
    # Keys and values are laid out alike: joined if every layer has the same of both.
    differing = {kind for kind, count in Counter(kind for kind, _ in counts).items() if count > 1}
    apart = differing | (set(CACHES) if differing & set(CACHES) else set())
    places: Counter[str] = Counter()
    slots: dict[str, Slot] = {}
    for state in program.states:
        base, shape, split = BASES[state.kind], shapes[state.input.name], state.input.dtype is torch.float32
        if state.kind in apart:
            slots[state.input.name] = Slot(f"{base}{state.layer}", (1, *shape), 0, split)
        else:
            slots[state.input.name] = Slot(base, (counts[state.kind, shape], *shape), places[base], split)
            places[base] += 1
    return StateLayout(slots, context)


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
        layout: Where things are.
        states: State name -> the function's input.
        start: Slot of the first new token, int32 [1].
        stop: Slot behind the last new token, int32 [1].
    """

    def __init__(self, ctx: Context, layout: StateLayout, states: Mapping[str, Any], start: Var, stop: Var) -> None:
        self._ctx, self._layout, self._states = ctx, layout, states
        self._start, self._stop = start, stop
        self._current: dict[str, Var] = {}

    def update(self, name: str, new: Var) -> Var:
        """Write the new keys or values of a layer and return all of them.

        Args:
            name: Input state of the Program.
            new: [1, heads, S, width].

        Returns:
            [1, heads, context, width]; slots behind the last token hold anything finite.
        """
        slot = self._layout.slots[name]
        return self._joined(self._write(slot, state, part) for state, part in self._parts(slot, new))

    def read(self, name: str) -> Var:
        """What the last step left of a state that is replaced as a whole, such as [1, channels, kernel size]."""
        slot = self._layout.slots[name]
        return self._joined(self._layer(slot, self._content(state)) for state in self._names(slot))

    def replace(self, present: Mapping[str, Var]) -> None:
        """Write states that are replaced as a whole.

        Args:
            present: Every such input state of the Program, in its order, with what it becomes. A Core ML state that
                several layers share is written once.
        """
        ctx, mb, layers = self._ctx, self._ctx.mb, dict[str, list[Var]]()
        for name, new in present.items():
            slot = self._layout.slots[name]
            # The last few of a free number of tokens are of a free number too, as coremltools infers it.
            fixed = mb.reshape(x=new, shape=ctx.ints(1, *slot.shape[1:]))
            for state, part in self._parts(slot, fixed):
                layers.setdefault(state, []).append(part)
        for state, parts in layers.items():
            value = parts[0] if len(parts) == 1 else mb.concat(values=parts, axis=ctx.constant(np.int32(0)))
            mb.coreml_update_state(state=self._states[state], value=value)

    def _names(self, slot: Slot) -> tuple[str, ...]:
        return (slot.state, slot.state + REMAINDER) if slot.split else (slot.state,)

    def _parts(self, slot: Slot, new: Var) -> Iterator[tuple[str, Var]]:
        """The states that hold a value together, and what of it each is to hold."""
        ctx, mb = self._ctx, self._ctx.mb
        rounded = ctx.cast(new, "fp16")
        yield slot.state, rounded
        if slot.split:
            rest = mb.sub(x=new, y=ctx.cast(rounded, "fp32"))
            scaled = mb.mul(x=rest, y=ctx.constant(np.float32(REMAINDER_SCALE)))
            yield slot.state + REMAINDER, ctx.cast(scaled, "fp16")

    def _joined(self, parts: Iterable[Var]) -> Var:
        """The value that the states hold together."""
        ctx, mb, held = self._ctx, self._ctx.mb, list(parts)
        if len(held) == 1:
            return held[0]
        high, low = (ctx.cast(part, "fp32") for part in held)
        return mb.add(x=high, y=mb.mul(x=low, y=ctx.constant(np.float32(1 / REMAINDER_SCALE))))

    def _content(self, state: str) -> Var:
        if state not in self._current:
            self._current[state] = self._ctx.mb.read_state(input=self._states[state])
        return self._current[state]

    def _write(self, slot: Slot, state: str, new: Var) -> Var:
        ctx, mb = self._ctx, self._ctx.mb
        _, heads, _, width = slot.shape
        before = self._content(state)
        axis = ctx.constant(np.int32(0))
        begin = ctx.shared(
            ("cache begin", slot.index),
            lambda: mb.concat(values=[ctx.ints(slot.index, 0), self._start, ctx.ints(0)], axis=axis),
        )
        end = ctx.shared(
            ("cache end", slot.index, heads, width),
            lambda: mb.concat(values=[ctx.ints(slot.index + 1, heads), self._stop, ctx.ints(width)], axis=axis),
        )
        changed = mb.slice_update(x=before, update=new, begin=begin, end=end)
        kept = mb.coreml_update_state(state=self._states[state], value=changed)
        self._current[state] = kept
        return self._layer(slot, kept)

    def _layer(self, slot: Slot, content: Var) -> Var:
        """The part of a state that is one layer's."""
        ctx, (layers, *sizes) = self._ctx, slot.shape
        if layers == 1:
            return content
        begin = ctx.ints(slot.index, *[0] * len(sizes))
        return ctx.mb.slice_by_index(x=content, begin=begin, end=ctx.ints(slot.index + 1, *sizes))
