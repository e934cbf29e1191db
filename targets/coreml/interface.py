"""Inputs of a model's functions, and the cache slots of their tokens: one class for each flavor."""

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

DEFAULT_HINT = "use the default flavor"
DERIVED = ("attention_mask", "position_ids", "cache_position")
"""Inputs of the Program that follow from the number of past tokens, for one sequence without padding."""


@dataclass(frozen=True)
class Shape:
    """Sizes that a model is built for.

    Attributes:
        context: Tokens that the KV cache holds.
        chunk: Maximum number of tokens per call.
    """

    context: int
    chunk: int


@dataclass(frozen=True)
class Entry:
    """One function of a model.

    Attributes:
        name: Name of the function.
        tokens: Number of tokens per call; None: from 1 to `Shape.chunk`.
        skip_experts: Whether each expert is a branch, which is skipped where no token needs it.
    """

    name: str
    tokens: int | None
    skip_experts: bool


@dataclass(frozen=True)
class NewTokens:
    """Cache slots and positions of the new tokens of a call.

    Attributes:
        start: Slot of the first new token, int32 [1].
        stop: Slot after that of the last new token, int32 [1].
        past: Number of past tokens, int32 [1].
        positions: Position of each new token, int32 [n].
        first: Slot of the token at position 0, int32 [1]; None: 0.
    """

    start: Var
    stop: Var
    past: Var
    positions: Var
    first: Var | None = None


class Interface(ABC):
    """The inputs of a model's functions in one flavor."""

    flavor: Flavor
    token_input: str
    entries: tuple[Entry, ...]

    @abstractmethod
    def inputs(self, mb: Any, types: Any, tokens: Any) -> dict[str, Any]:
        """Placeholders by name; the first is that of the token ids [1, `tokens`]."""

    @abstractmethod
    def ranges(self, shape: Shape, added: Sequence[TensorSpec]) -> tuple[Any, ...]:
        """Input types of a function with a variable number of tokens; `added` are inputs that passes added."""

    @abstractmethod
    def new_tokens(self, ctx: Context, inputs: Mapping[str, Var], states: Mapping[str, tuple[int, ...]]) -> NewTokens:
        """Slots and positions of the new tokens; `states` are shapes of states, whose values are in `inputs`."""


class DefaultInterface(Interface):
    """`prefill` and `decode`: slots are an input, and the slot of a token is its position."""

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
        """From 1 token to `shape.chunk`."""
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

    def new_tokens(self, ctx: Context, inputs: Mapping[str, Var], states: Mapping[str, tuple[int, ...]]) -> NewTokens:  # noqa: ARG002
        """Slots and positions are those of `cache_position`."""
        mb, position = ctx.mb, inputs["cache_position"]
        start = mb.slice_by_size(x=position, begin=[0], size=[1])
        last = mb.slice_by_index(x=position, begin=[-1], end=[0], end_mask=[True])
        return NewTokens(start, mb.add(x=last, y=np.int32(1)), start, position)


class SwiftInterface(Interface):
    """One function for prompts and single tokens, as swift-transformers calls it.

    The last axis of `causalMask` is the length of the sequence, from which the number of past tokens follows. Its
    values are not read: the library always passes one row of zeros. The library also counts one token too many from the
    first call on, so that its tokens start in slot 1. Slot 0 is then never written, and its keys stay zero. Callers
    that count exactly start in slot 0. Both get the same results, since positions are counted from the first used slot.
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
        """From 1 token to `shape.chunk`, here the whole cache, since the library passes a prompt in one piece."""
        ct = coremltools_module()
        length, rows, total = (ct.RangeDim(lower_bound=1, upper_bound=shape.chunk, default=1) for _ in range(3))
        return (
            ct.TensorType(name="inputIds", shape=(1, length), dtype=np.int32),
            ct.TensorType(name="causalMask", shape=(1, 1, rows, total), dtype=np.float16),
        )

    def new_tokens(self, ctx: Context, inputs: Mapping[str, Var], states: Mapping[str, tuple[int, ...]]) -> NewTokens:
        """Slots and positions follow from the shapes of the inputs."""
        mb, one = ctx.mb, ctx.ints(1)
        total = mb.slice_by_size(x=mb.shape(x=inputs["causalMask"]), begin=[3], size=[1])
        new = mb.slice_by_size(x=mb.shape(x=inputs["inputIds"]), begin=[1], size=[1])
        start = mb.sub(x=total, y=new)
        first = mb.mul(x=self._empty(ctx, inputs, states), y=mb.minimum(x=start, y=one))
        past = mb.sub(x=start, y=first)
        ones = mb.fill_like(ref_tensor=mb.squeeze(x=inputs["inputIds"], axes=[0]), value=np.int32(1))
        counted = mb.cumsum(x=ones, axis=0, exclusive=True, reverse=False)
        return NewTokens(start, total, past, mb.add(x=counted, y=past), first)

    def _empty(self, ctx: Context, inputs: Mapping[str, Var], states: Mapping[str, tuple[int, ...]]) -> Var:
        """1 if slot 0 was never written, else 0: int32 [1]."""
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
    """Shape of an input that a pass added, for `tokens` tokens. Core ML has no scalar inputs, so a scalar is [1]."""
    return tuple(tokens if size == SEQUENCE else size for size in spec.shape) or (1,)


def refusals(program: Program, flavor: Flavor) -> tuple[Rejection, ...]:
    """What `flavor` does not support in `program`."""
    if flavor is not Flavor.SWIFT:
        return ()
    found = [
        Rejection("coreml", f"input {spec.name}", f"{flavor} feeds no such input", f"fix its value, or {DEFAULT_HINT}")
        for spec in extra_inputs(program)
    ]
    known = " and ".join(CACHES.values())
    others = [state for state in program.states if state.kind not in CACHES]
    found += [
        Rejection(
            "coreml",
            f"layer {state.layer}",
            f"its state of kind {state.kind} is not a KV cache: {flavor} supports only {known}",
            DEFAULT_HINT,
        )
        for state in others[:1]
    ]
    keys_and_values = tuple(state for state in program.states if state.kind in CACHES)
    locations = state_layout(program.replace(states=keys_and_values), 1).locations.values()
    states = list(dict.fromkeys(location.state for location in locations))
    if states != list(CACHES.values()):
        reason = f"KV caches that differ between layers need {len(states)} states, but {flavor} supports only {known}"
        found.append(Rejection("coreml", f"states {', '.join(states[:3])}, ...", reason, DEFAULT_HINT))
    return tuple(found)
