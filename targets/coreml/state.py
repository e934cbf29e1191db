"""The key-value cache as Core ML states.

A state is a tensor of fixed shape that outlives a prediction; Core ML takes fp16 alone. When all layers agree there are
two, `keyCache` and `valueCache` [layers, heads, context, width]; else each layer has its own. A program that computes
in fp32 keeps each value as the sum of two: the value rounded to fp16, and what that left, scaled up so that it does not
vanish. Together they hold 22 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.compiler.errors import LoweringError
from moec.compiler.program import Program
from moec.targets.coreml.context import Context, Var

BASES: Mapping[str, str] = {"key": "keyCache", "value": "valueCache"}
REMAINDER = "Remainder"
REMAINDER_SCALE = 2048.0
"""The remainder of rounding to fp16 is below 2^-11 of the value."""


@dataclass(frozen=True)
class Slot:
    """Where the key or value cache of a layer is.

    Attributes:
        state: Name of the state.
        shape: Shape of the state.
        index: Place of the layer along axis 0 of the state.
    """

    state: str
    shape: tuple[int, ...]
    index: int


@dataclass(frozen=True)
class CacheLayout:
    """Which state holds what.

    Attributes:
        slots: Name of each input state of the Program -> its place.
        context: Tokens that the cache holds.
        split: Whether each value is the sum of two states.
    """

    slots: Mapping[str, Slot]
    context: int
    split: bool

    def states(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every state of the model, in the order of the layers."""
        found: dict[str, tuple[int, ...]] = {}
        for slot in self.slots.values():
            found[slot.state] = slot.shape
            if self.split:
                found[slot.state + REMAINDER] = slot.shape
        return found


def cache_layout(program: Program, context: int, *, split: bool) -> CacheLayout:
    """Lay out the states of `program` for `context` tokens.

    Raises:
        LoweringError: A state is no key-value cache.
    """
    widths: dict[str, set[tuple[int, int]]] = {kind: set() for kind in BASES}
    sizes: dict[str, tuple[int, int]] = {}
    for state in program.states:
        if state.kind not in BASES:
            raise LoweringError(
                f"layer {state.layer}: the CoreML target has no state of kind {state.kind}",
                hint="models whose layers all attend can be built",
            )
        heads, width = state.input.shape[1], state.input.shape[3]
        assert isinstance(heads, int)
        assert isinstance(width, int)
        sizes[state.input.name] = (heads, width)
        widths[state.kind].add((heads, width))
    joined = all(len(found) <= 1 for found in widths.values())
    counts = {kind: sum(state.kind == kind for state in program.states) for kind in BASES}
    places = dict.fromkeys(BASES, 0)
    slots: dict[str, Slot] = {}
    for state in program.states:
        heads, width = sizes[state.input.name]
        base, place = BASES[state.kind], places[state.kind]
        name, layers, index = (base, counts[state.kind], place) if joined else (f"{base}{state.layer}", 1, 0)
        slots[state.input.name] = Slot(name, (layers, heads, context, width), index)
        places[state.kind] += 1
    return CacheLayout(slots, context, split)


class Cache:
    """Reads and writes the states of one function.

    Args:
        ctx: The function's context.
        layout: Where things are.
        states: State name -> the function's input.
        start: Slot of the first new token, int32 [1].
        stop: Slot behind the last new token, int32 [1].
    """

    def __init__(self, ctx: Context, layout: CacheLayout, states: Mapping[str, Any], start: Var, stop: Var) -> None:
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
        ctx, mb, slot = self._ctx, self._ctx.mb, self._layout.slots[name]
        if not self._layout.split:
            return self._write(slot, slot.state, new)
        rounded = ctx.cast(new, "fp16")
        rest = mb.sub(x=new, y=ctx.cast(rounded, "fp32"))
        scaled = ctx.cast(mb.mul(x=rest, y=ctx.constant(np.float32(REMAINDER_SCALE))), "fp16")
        high = ctx.cast(self._write(slot, slot.state, rounded), "fp32")
        low = ctx.cast(self._write(slot, slot.state + REMAINDER, scaled), "fp32")
        return mb.add(x=high, y=mb.mul(x=low, y=ctx.constant(np.float32(1 / REMAINDER_SCALE))))

    def _write(self, slot: Slot, state: str, new: Var) -> Var:
        ctx, mb = self._ctx, self._ctx.mb
        layers, heads, context, width = slot.shape
        if state not in self._current:
            self._current[state] = mb.read_state(input=self._states[state])
        axis = ctx.constant(np.int32(0))
        begin = ctx.shared(
            ("cache begin", slot.index),
            lambda: mb.concat(values=[ctx.ints(slot.index, 0), self._start, ctx.ints(0)], axis=axis),
        )
        end = ctx.shared(
            ("cache end", slot.index, heads, width),
            lambda: mb.concat(values=[ctx.ints(slot.index + 1, heads), self._stop, ctx.ints(width)], axis=axis),
        )
        changed = mb.slice_update(x=self._current[state], update=new, begin=begin, end=end)
        kept = mb.coreml_update_state(state=self._states[state], value=changed)
        self._current[state] = kept
        if layers == 1:
            return kept
        return mb.slice_by_index(
            x=kept, begin=ctx.ints(slot.index, 0, 0, 0), end=ctx.ints(slot.index + 1, heads, context, width)
        )
