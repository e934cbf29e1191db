"""Inputs of a model's functions, and where the tokens that they bring go in the cache: one class for each flavor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program, TensorSpec
from moec.targets.base import Phase
from moec.targets.common.added_inputs import SEQUENCE
from moec.targets.coreml.context import MIL_NAMES, NUMPY, Context, Var
from moec.targets.coreml.flavors import Flavor
from moec.targets.coreml.library import coremltools_module
from moec.targets.coreml.state import CACHES, state_layout
from moec.targets.coreml.weights import identifier

DEFAULT_HINT = "take the default flavor"
DERIVED = ("attention_mask", "position_ids", "cache_position")
"""Inputs of the Program that follow from where the new tokens are when there is one sequence without padding."""


@dataclass(frozen=True)
class Shape:
    """Sizes that a model is built for.

    Attributes:
        context: Tokens that the cache holds.
        chunk: Most tokens of one call.
    """

    context: int
    chunk: int


@dataclass(frozen=True)
class Entry:
    """One function of a model.

    Attributes:
        name: Its name.
        tokens: Tokens of a call; None: from 1 to the chunk.
        skip_experts: Whether each expert is a branch, skipped where no token needs it.
    """

    name: str
    tokens: int | None
    skip_experts: bool


@dataclass(frozen=True)
class Places:
    """Where the new tokens of a call are.

    Attributes:
        start: Slot of the first one in the cache, int32 [1].
        stop: Slot behind the last, int32 [1].
        past: Tokens before them, int32 [1].
        positions: Position of each, int32 [n].
        first: Slot of the token at position 0, int32 [1]; None: 0.
    """

    start: Var
    stop: Var
    past: Var
    positions: Var
    first: Var | None = None


class Interface(ABC):
    """How a model is called."""

    flavor: Flavor
    token_input: str
    entries: tuple[Entry, ...]

    @abstractmethod
    def inputs(self, mb: Any, types: Any, tokens: Any) -> dict[str, Any]:
        """Placeholders by name, the one of the token ids [1, `tokens`] first."""

    @abstractmethod
    def ranges(self, shape: Shape, added: Sequence[TensorSpec]) -> tuple[Any, ...]:
        """Types of the inputs of a function whose number of tokens is free; `added` are those of passes."""

    @abstractmethod
    def places(self, ctx: Context, inputs: Mapping[str, Var], states: Mapping[str, tuple[int, ...]]) -> Places:
        """Where the new tokens go. `states` are the shapes of the states; their values are among `inputs`."""


class DefaultInterface(Interface):
    """`prefill` and `decode`: slots are given, and the slot of a token is its position."""

    flavor = Flavor.DEFAULT
    token_input = "input_ids"
    entries = (Entry(Phase.DECODE.value, 1, skip_experts=True), Entry(Phase.PREFILL.value, None, skip_experts=False))

    def inputs(self, mb: Any, types: Any, tokens: Any) -> dict[str, Any]:
        """`input_ids` and `cache_position`."""
        return {
            "input_ids": mb.placeholder((1, tokens), types.int32),
            "cache_position": mb.placeholder((tokens,), types.int32),
        }

    def ranges(self, shape: Shape, added: Sequence[TensorSpec]) -> tuple[Any, ...]:
        """From 1 token to a chunk."""
        ct = coremltools_module()
        length = ct.RangeDim(lower_bound=1, upper_bound=shape.chunk, default=1)
        return (
            ct.TensorType(name="input_ids", shape=(1, length), dtype=np.int32),
            ct.TensorType(name="cache_position", shape=(length,), dtype=np.int32),
            *(
                ct.TensorType(
                    name=identifier(spec.name), shape=added_shape(spec, length), dtype=NUMPY[MIL_NAMES[spec.dtype]]
                )
                for spec in added
                if SEQUENCE in spec.shape
            ),
        )

    def places(self, ctx: Context, inputs: Mapping[str, Var], states: Mapping[str, tuple[int, ...]]) -> Places:  # noqa: ARG002
        """As `cache_position` says."""
        mb, position = ctx.mb, inputs["cache_position"]
        start = mb.slice_by_size(x=position, begin=[0], size=[1])
        last = mb.slice_by_index(x=position, begin=[-1], end=[0], end_mask=[True])
        return Places(start, mb.add(x=last, y=np.int32(1)), start, position)


class SwiftInterface(Interface):
    """One function for prompts and single tokens, as swift-transformers calls it.

    `causalMask` tells by its last axis, the length of the sequence, how many tokens came before. Its values are not
    read: the library gives zeros and one row whatever it asks for. It also counts one token too many, from the first
    call on, so that its tokens start in slot 1 and slot 0 is never written, which an all-zero key shows. Callers that
    count exactly start in slot 0. Both get the same results: positions are counted from the first slot in use.
    """

    flavor = Flavor.SWIFT
    token_input = "inputIds"
    entries = (Entry("main", None, skip_experts=True),)

    def inputs(self, mb: Any, types: Any, tokens: Any) -> dict[str, Any]:
        """`inputIds` and `causalMask`."""
        rows, total = (coremltools_module("coremltools.converters.mil.mil").get_new_symbol() for _ in range(2))
        return {
            "inputIds": mb.placeholder((1, tokens), types.int32),
            "causalMask": mb.placeholder((1, 1, rows, total), types.fp16),
        }

    def ranges(self, shape: Shape, added: Sequence[TensorSpec]) -> tuple[Any, ...]:  # noqa: ARG002 - it has none
        """From 1 token to all that the cache holds: the library passes a prompt in one piece."""
        ct = coremltools_module()
        length, rows, total = (ct.RangeDim(lower_bound=1, upper_bound=shape.chunk, default=1) for _ in range(3))
        return (
            ct.TensorType(name="inputIds", shape=(1, length), dtype=np.int32),
            ct.TensorType(name="causalMask", shape=(1, 1, rows, total), dtype=np.float16),
        )

    def places(self, ctx: Context, inputs: Mapping[str, Var], states: Mapping[str, tuple[int, ...]]) -> Places:
        """As the shapes say."""
        mb, one = ctx.mb, ctx.ints(1)
        total = mb.slice_by_size(x=mb.shape(x=inputs["causalMask"]), begin=[3], size=[1])
        new = mb.slice_by_size(x=mb.shape(x=inputs["inputIds"]), begin=[1], size=[1])
        start = mb.sub(x=total, y=new)
        first = mb.mul(x=self._empty(ctx, inputs, states), y=mb.minimum(x=start, y=one))
        past = mb.sub(x=start, y=first)
        ones = mb.fill_like(ref_tensor=mb.squeeze(x=inputs["inputIds"], axes=[0]), value=np.int32(1))
        counted = mb.cumsum(x=ones, axis=0, exclusive=True, reverse=False)
        return Places(start, total, past, mb.add(x=counted, y=past), first)

    def _empty(self, ctx: Context, inputs: Mapping[str, Var], states: Mapping[str, tuple[int, ...]]) -> Var:
        """1 if nothing was ever written to the first slot, else 0: int32 [1]."""
        mb, (_, heads, _, width) = ctx.mb, states[CACHES["key"]]
        cached = mb.read_state(input=inputs[CACHES["key"]])
        key = mb.slice_by_size(x=cached, begin=[0, 0, 0, 0], size=[1, heads, 1, width])
        written = ctx.cast(mb.not_equal(x=key, y=ctx.constant(np.float16(0))), "int32")
        some = mb.reduce_max(x=written, axes=ctx.ints(1, 2, 3), keep_dims=ctx.constant(False))
        return mb.sub(x=ctx.ints(1), y=some)


INTERFACES: Mapping[Flavor, Interface] = {item.flavor: item for item in (DefaultInterface(), SwiftInterface())}


def extra_inputs(program: Program) -> list[TensorSpec]:
    """Inputs that passes added, such as a routing budget."""
    return [spec for spec in program.inputs if spec.name not in (*DERIVED, "input_ids")]


def added_shape(spec: TensorSpec, tokens: Any) -> tuple[Any, ...]:
    """Shape of an input that a pass added, for so many tokens; Core ML has no inputs without axes."""
    return tuple(tokens if size == SEQUENCE else size for size in spec.shape) or (1,)


def refusals(program: Program, flavor: Flavor) -> tuple[Rejection, ...]:
    """What of `program` does not fit `flavor`."""
    if flavor is not Flavor.SWIFT:
        return ()
    found = [
        Rejection("coreml", f"input {spec.name}", f"{flavor} feeds no such input", "fix its value, or " + DEFAULT_HINT)
        for spec in extra_inputs(program)
    ]
    known = " and ".join(CACHES.values())
    found += [
        Rejection(
            "coreml",
            f"layer {state.layer}",
            f"its state of kind {state.kind} is no cache: {flavor} knows {known}",
            DEFAULT_HINT,
        )
        for state in program.replaced[:1]
    ]
    slots = state_layout(program.replace(states=program.caches), 1).slots.values()
    states = list(dict.fromkeys(slot.state for slot in slots))
    if states != list(CACHES.values()):
        reason = f"layers whose caches differ in heads or width need {len(states)} states, but {flavor} knows {known}"
        found.append(Rejection("coreml", f"states {', '.join(states[:3])}, ...", reason, DEFAULT_HINT))
    return tuple(found)
