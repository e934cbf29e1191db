"""A KV cache in 8 bits: which caches can be rounded, and the scale of each channel, measured on text.

A channel of a head has one scale for all tokens, the largest absolute value in it over 127, so a new token is rounded
without touching the old ones. Keys are those that attention gets, after the rotary embedding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.common.digest import sha256_of_chunks
from moec.compiler.common.errors import CheckpointError
from moec.compiler.common.model_config import context_length
from moec.compiler.ir.interpreter import ProgramRunner, empty_states
from moec.compiler.ir.operands import Attention
from moec.compiler.ir.program import ATTENTION, Program, StateSpec

LARGEST = 127
"""The code of the largest value of a channel on the text. A larger one in another text becomes 127 or -128."""
BATCH = 4
"""Windows that run together."""
_PAST = {"key": "past_key", "value": "past_value"}
_OUTPUT = {"key": 1, "value": 2}


@dataclass(frozen=True)
class AttentionCache:
    """The keys and values that one or more attention nodes keep; layers that share keys have one cache.

    Attributes:
        key: The state of the keys, [batch, heads, tokens, width].
        value: The state of the values.
        nodes: The attention nodes that append to them.
        reason: Why the cache cannot hold codes; empty if it can.
    """

    key: StateSpec
    value: StateSpec
    nodes: tuple[fx.Node, ...]
    reason: str = ""

    @property
    def states(self) -> tuple[StateSpec, StateSpec]:
        """Keys and values."""
        return self.key, self.value


def attention_caches(program: Program) -> tuple[AttentionCache, ...]:
    """The KV caches of the attention nodes of `program`. States of other kinds are not among them."""
    inputs = [spec.name for spec in program.inputs] + [state.input.name for state in program.states]
    placeholders = program.graph.find_nodes(op="placeholder")
    names = dict(zip(placeholders, inputs, strict=True))
    states = {state.input.name: state for state in program.states}
    found: dict[tuple[str, str], list[fx.Node]] = {}
    for node in program.nodes(ATTENTION):
        own = Attention.of(node)
        pair = names.get(own.past_key, ""), names.get(own.past_value, "")
        if all(name in states for name in pair):
            found.setdefault(pair, []).append(node)
    by_name = {name: node for node, name in names.items()}
    return tuple(
        AttentionCache(states[key], states[value], tuple(nodes), _reason([by_name[key], by_name[value]], nodes))
        for (key, value), nodes in found.items()
    )


def _reason(past: list[fx.Node], nodes: list[fx.Node]) -> str:
    """Why the past and present of `nodes` must stay floats; empty if nothing but attention reads them."""
    readers = {user for state in past for user in state.users if user.target is not torch.ops.aten.sym_size.int}
    if not readers <= set(nodes):
        return "something besides its attention reads the cache of the step before"
    for node in nodes:
        present = [user for user in node.users if user.target is operator.getitem and user.args[1] in _OUTPUT.values()]
        if any(user.op != "output" for item in present for user in item.users):
            return "something besides the next step reads its keys or values"
    return ""


def measure_scales(
    program: Program, windows: np.ndarray, told: Callable[[int, int], None] = lambda *_: None
) -> Mapping[str, Tensor]:
    """The scales of all caches that can be rounded.

    The windows are placed at positions that are spread over the context of the model: rotary embedding turns the
    channels of a key by angles that grow with the position, some so slowly that a text at the first positions does not
    show how large the other channel of a pair becomes in their place.

    Args:
        program: The Program, with activations in float32.
        windows: Calibration tokens [n, length].
        told: Called with the number of windows that are done, and of all.

    Returns:
        Input name of a state -> scale of each channel, [heads, width] float32.

    Raises:
        CheckpointError: A key or value is NaN or infinite.
    """
    largest: dict[str, Tensor] = {}
    caches = {node: cache for cache in attention_caches(program) if not cache.reason for node in cache.nodes}

    def observe(node: fx.Node, args: tuple[Any, ...], _result: Any) -> None:
        if (cache := caches.get(node)) is None:
            return
        for state, values in zip(cache.states, args[1:3], strict=True):
            seen = values.float().abs().amax(dim=(0, 2))
            name = state.input.name
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

    runner = ProgramRunner(program, observer=observe)
    starts = _starts(program, windows)
    for index in range(0, len(windows), BATCH):
        batch = windows[index : index + BATCH]
        feeds = runner.inputs(batch, None, 0)
        positions = feeds["position_ids"] + torch.from_numpy(starts[index : index + BATCH, None])
        runner.run({**feeds, **empty_states(program, len(batch)), "position_ids": positions})
        told(min(index + BATCH, len(windows)), len(windows))
    return {name: _scale(name, seen) for name, seen in largest.items()}


def _starts(program: Program, windows: np.ndarray) -> np.ndarray:
    """Position of the first token of each window, from 0 to where the last one ends with the context: [n] int64."""
    count, length = windows.shape
    room = max(0, (context_length(program.config) or length) - length)
    return np.linspace(0, room, count).astype(np.int64)


def _scale(name: str, largest: Tensor) -> Tensor:
    """The scale of each channel; one that was always 0 gets that of the largest channel, or 1 if all were 0."""
    if not bool(largest.isfinite().all()):
        raise CheckpointError(
            f"{name}: keys or values on the calibration text are NaN or infinite",
            hint="is the checkpoint damaged, or its attention unstable on this text?",
        )
    most = largest.max()
    usual = most if bool(most > 0) else torch.tensor(float(LARGEST))
    return torch.where(largest > 0, largest, usual) / LARGEST


def unit_scales(program: Program) -> Mapping[str, Tensor]:
    """Scales of 1 of all caches that can be rounded, to ask a target before the text is read."""
    return {name: torch.ones(shape) for name, shape in _shapes(program)}


def _shapes(program: Program) -> Iterator[tuple[str, tuple[int, int]]]:
    for cache in attention_caches(program):
        for state in cache.states if not cache.reason else ():
            _, heads, _, width = state.input.shape
            yield state.input.name, (int(heads), int(width))


def scale_name(state: str) -> str:
    """Name of the weight that holds the scales of a cache; `state` is the name of its input."""
    return f"{state}.scale"


def sha256_of_scale(scale: Tensor) -> str:
    """SHA-256 of scales, as moec.json records it."""
    return sha256_of_chunks([scale.to(torch.float32).contiguous().view(-1).view(torch.uint8).numpy().data])
