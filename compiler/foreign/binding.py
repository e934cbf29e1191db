"""Which inputs and outputs of a file are tokens, mask, positions, states and logits: by name and by shape.

What exporters call them is data (`ROLES`, `CONVENTIONS`). States that no convention names are paired by their shapes.
What cannot be found that way is given in a YAML file:

```yaml
input_ids: tokens                # names in the file; only those that are not found by themselves
attention_mask: mask
position_ids: pos
logits: scores
states:                          # all of them, in any order; kinds are those of docs/architecture.md
  - {layer: 0, kind: key, input: cache_k_0, output: new_k_0}
  - {layer: 0, kind: value, input: cache_v_0, output: new_v_0}
constants: {use_cache: true}     # inputs that always get the same value
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from moec.compiler.common.errors import CheckpointError, UsageError
from moec.compiler.common.files import read_yaml
from moec.compiler.common.validation import validate
from moec.compiler.ir.program import CACHE_KINDS, Program, StateSpec
from moec.targets.model_files import Port

ROLES: Mapping[str, tuple[str, ...]] = {
    "input_ids": ("input_ids", "tokens", "token_ids", "inputIds", "ids"),
    "attention_mask": ("attention_mask", "mask", "attn_mask", "causal_mask", "causalMask"),
    "position_ids": ("position_ids", "input_pos", "cache_position", "positions"),
    "logits": ("logits", "output", "scores"),
}
"""What an input or output is -> the names that exporters give it."""

CONSTANTS: Mapping[str, float] = {"use_cache_branch": 1, "num_logits_to_keep": 0, "logits_to_keep": 0, "beam_idx": 0}
"""Inputs with one value for every step: a branch of optimum, all logits instead of the last, and no beam search."""


@dataclass(frozen=True, slots=True)
class Convention:
    """How an exporter names the states of one kind; `{}` is the number of the layer."""

    by: str
    kind: str
    input: str
    output: str


CONVENTIONS: tuple[Convention, ...] = (
    Convention("optimum, onnxruntime-genai", "key", "past_key_values.{}.key", "present.{}.key"),
    Convention("optimum, onnxruntime-genai", "value", "past_key_values.{}.value", "present.{}.value"),
    Convention("mobius", "key", "past_key_values.{}.key", "present_key_values.{}.key"),
    Convention("mobius", "value", "past_key_values.{}.value", "present_key_values.{}.value"),
    Convention("onnxruntime-genai", "conv", "past.{}.conv", "present.{}.conv"),
    Convention("onnxruntime-genai", "conv", "past_key_values.{}.conv_state", "present.{}.conv_state"),
    Convention("onnxruntime-genai", "recurrent", "past_key_values.{}.recurrent_state", "present.{}.recurrent_state"),
    Convention("transformers.js", "conv", "past_conv.{}", "present_conv.{}"),
    Convention("transformers.js", "recurrent", "past_recurrent.{}", "present_recurrent.{}"),
    Convention("transformers", "key", "past_key_values.layers.{}.keys", "cache.layers.{}.keys"),
    Convention("transformers", "value", "past_key_values.layers.{}.values", "cache.layers.{}.values"),
    Convention("litert-torch", "key", "kv_cache_k_{}", "kv_cache_k_{}"),
    Convention("litert-torch", "value", "kv_cache_v_{}", "kv_cache_v_{}"),
)


class StateNames(BaseModel):
    """The names of one state, in a YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    kind: str
    input: str
    output: str


class Bindings(BaseModel):
    """The names that a user gives; see the top of this module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_ids: str | None = None
    attention_mask: str | None = None
    position_ids: str | None = None
    logits: str | None = None
    states: tuple[StateNames, ...] = ()
    constants: dict[str, bool | int | float] = {}

    @classmethod
    def read(cls, path: Path) -> Bindings:
        """Read a YAML file.

        Raises:
            UsageError: The file is missing, or a key or value is wrong.
        """
        content = read_yaml(path, UsageError, hint="docs/foreign.md has an example")
        return validate(cls, content, where=str(path))


@dataclass(frozen=True, slots=True)
class BoundState:
    """One state of a file.

    Attributes:
        input: Name of the input.
        output: Name of the output that replaces it.
        shape: Shape before the first step; an axis that counts tokens has 0, or the length of a buffer.
        dtype: Its dtype.
        buffer: Length of the axis that counts tokens if it is fixed, so that a step writes into it; else None.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    buffer: int | None = None


@dataclass(frozen=True)
class Binding:
    """What the inputs and outputs of a file are; `mask`, `positions` are None where it has no such input.

    `whole`: it keeps no states at all, so that every step gets the whole sequence.
    """

    ids: Port
    mask: Port | None
    positions: Port | None
    logits: Port
    states: tuple[BoundState, ...]
    constants: Mapping[str, tuple[Port, float]] = field(default_factory=dict)
    whole: bool = False


def bind(
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    program: Program,
    given: Bindings,
    where: str,
    *,
    inside: bool = False,
) -> Binding:
    """Find out what each input and output is.

    Args:
        inputs: The inputs of the file.
        outputs: Its outputs.
        program: The checkpoint's Program.
        given: Names that the user gave.
        where: The file, for messages.
        inside: Whether the file keeps its states itself, so that they are no inputs.

    Raises:
        UsageError: Something was not found, or the user named something that the file does not have.
        CheckpointError: Vocabulary or states are those of another model.
    """
    ports, returned = {port.name: port for port in inputs}, {port.name: port for port in outputs}
    _check_given(given, ports, returned, where)
    logits = _role("logits", given.logits, returned) or _by_vocabulary(outputs, program, where)
    _check_vocabulary(logits, program, where)
    ids = _role("input_ids", given.input_ids, ports) or _only_integers(inputs)
    if ids is None:
        raise unbound(where, "no input holds token ids", ["input_ids: NAME"], inputs, outputs)
    mask = _role("attention_mask", given.attention_mask, ports)
    positions = _role("position_ids", given.position_ids, ports)
    whole = not inside and not given.states and not any(map(_may_be_state, inputs))
    states = () if inside or whole else _states(inputs, outputs, program, given, where)
    constants = {
        name: (ports[name], float(value)) for name, value in {**CONSTANTS, **given.constants}.items() if name in ports
    }
    known = {port.name for port in (ids, mask, positions) if port} | {state.input for state in states} | set(constants)
    if left := [port.name for port in inputs if port.name not in known]:
        lines = [f"constants: {{{name}: VALUE}}" for name in left[:1]]
        raise unbound(where, f"nothing is known about the inputs {', '.join(left)}", lines, inputs, outputs)
    return Binding(ids, mask, positions, logits, states, constants, whole)


def unbound(where: str, what: str, lines: Sequence[str], inputs: Sequence[Port], outputs: Sequence[Port]) -> UsageError:
    """The error for something that was not found, with the lines of YAML to write."""
    held = f"inputs: {_listing(inputs)}; outputs: {_listing(outputs)}"
    return UsageError(f"{where}: {what} ({held})", hint=f"write to a file for --bindings: {'; '.join(lines)}")


def _listing(ports: Sequence[Port]) -> str:
    shown = [f"{port.name} {['?' if size is None else size for size in port.shape]}" for port in ports[:12]]
    return ", ".join(shown).replace("'", "") + (f" and {len(ports) - 12} more" if len(ports) > 12 else "")


def _check_given(given: Bindings, inputs: Mapping[str, Port], outputs: Mapping[str, Port], where: str) -> None:
    own = (given.input_ids, given.attention_mask, given.position_ids)
    named = [name for name in own if name] + [state.input for state in given.states] + list(given.constants)
    wanted = [name for name in named if name not in inputs]
    wanted += [
        name for name in (given.logits, *(state.output for state in given.states)) if name and name not in outputs
    ]
    if wanted:
        raise UsageError(
            f"--bindings: {where} has no {', '.join(wanted)}",
            hint=f"inputs: {', '.join(inputs)}; outputs: {', '.join(outputs)}",
        )


def _role(role: str, given: str | None, ports: Mapping[str, Port]) -> Port | None:
    names = (given,) if given else ROLES[role]
    return next((ports[name] for name in names if name in ports), None)


def _only_integers(inputs: Sequence[Port]) -> Port | None:
    """The only input of integers with two axes, which must be the token ids."""
    found = [port for port in inputs if port.dtype.kind in "iu" and len(port.shape) == 2]
    return found[0] if len(found) == 1 else None


def _by_vocabulary(outputs: Sequence[Port], program: Program, where: str) -> Port:
    found = [port for port in outputs if port.shape and port.shape[-1] == program.vocab_size]
    if len(found) != 1:
        raise unbound(where, "no output holds logits", ["logits: NAME"], (), outputs)
    return found[0]


def _check_vocabulary(logits: Port, program: Program, where: str) -> None:
    size = logits.shape[-1] if logits.shape else None
    if size is not None and size != program.vocab_size:
        raise CheckpointError(
            f"{where}: {logits.name} has {size} entries, and the checkpoint's vocabulary {program.vocab_size}",
            hint="give the checkpoint that the file was made from",
        )


def _states(
    inputs: Sequence[Port], outputs: Sequence[Port], program: Program, given: Bindings, where: str
) -> tuple[BoundState, ...]:
    """The states of the file, one for each of the Program."""
    ports = {port.name: port for port in inputs}
    specs = {(state.kind, state.layer): state for state in program.states}
    found: dict[tuple[str, int], tuple[str, str]] = {}
    if given.states:
        found = {(state.kind, state.layer): (state.input, state.output) for state in given.states}
    else:
        for kind in {state.kind for state in program.states}:
            found |= _by_convention(kind, ports, {port.name for port in outputs}, program, where)
        found |= _by_shape(inputs, outputs, [spec for key, spec in specs.items() if key not in found], found)
    if missing := sorted(key for key in specs if key not in found):
        lines = [
            f"states: - {{layer: {layer}, kind: {kind}, input: NAME, output: NAME}}" for kind, layer in missing[:1]
        ]
        what = f"it keeps no state for {', '.join(f'{kind} of layer {layer}' for kind, layer in missing[:4])}"
        raise unbound(where, what, lines, inputs, outputs)
    return tuple(_bound(specs[key], ports[names[0]], names[1], where) for key, names in sorted(found.items()))


def _by_convention(
    kind: str, inputs: Mapping[str, Port], outputs: set[str], program: Program, where: str
) -> dict[tuple[str, int], tuple[str, str]]:
    """The states of one kind under the first convention that names any.

    Layers are counted as in the model or among the layers with such a state, so they are put in order.
    """
    layers = sorted(state.layer for state in program.states if state.kind == kind)
    for convention in CONVENTIONS:
        if convention.kind != kind:
            continue
        pattern = re.compile(re.escape(convention.input).replace(r"\{\}", r"(\d+)"))
        numbers = sorted(int(match[1]) for name in inputs if (match := pattern.fullmatch(name)))
        numbers = [number for number in numbers if convention.output.format(number) in outputs]
        if not numbers:
            continue
        if len(numbers) != len(layers):
            raise CheckpointError(
                f"{where}: it keeps the state {kind} of {len(numbers)} layers, the checkpoint of {len(layers)}",
                hint="give the checkpoint that the file was made from",
            )
        return {
            (kind, layer): (convention.input.format(number), convention.output.format(number))
            for layer, number in zip(layers, numbers, strict=True)
        }
    return {}


def _by_shape(
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    specs: Sequence[StateSpec],
    found: Mapping[tuple[str, int], tuple[str, str]],
) -> dict[tuple[str, int], tuple[str, str]]:
    """States without a known name: inputs and outputs of the same shape, in the order of the layers.

    They are used only if there are exactly as many as the Program has states left.
    """
    taken = {name for names in found.values() for name in names}
    before = [port for port in inputs if port.name not in taken and _may_be_state(port)]
    after = [port for port in outputs if port.name not in taken and _may_be_state(port)]
    fits = len(before) == len(after) == len(specs) and all(
        len(first.shape) == len(second.shape) for first, second in zip(before, after, strict=True)
    )
    if not fits:
        return {}
    order = sorted(specs, key=lambda spec: (spec.layer, spec.kind))
    return {
        (spec.kind, spec.layer): (first.name, second.name)
        for spec, first, second in zip(order, before, after, strict=True)
    }


def _may_be_state(port: Port) -> bool:
    return (
        port.dtype.kind == "f"
        and len(port.shape) >= 3
        and port.name not in {*ROLES["logits"], *ROLES["attention_mask"]}
    )


_LAYOUTS = ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3))
"""Where the axes [batch, heads, tokens, width] of a cache may be: the axis of the file for each."""


def _bound(spec: StateSpec, port: Port, output: str, where: str) -> BoundState:
    """The state `port`, with axes of unknown length filled in from the Program.

    Raises:
        CheckpointError: Its shape is not that of the checkpoint's state.
    """
    wanted = spec.input.shape
    if spec.kind not in CACHE_KINDS:
        # The kernel of a convolution may be kept with or without its newest position.
        sizes = [own if own is not None else _size(given) for own, given in zip(port.shape, wanted, strict=False)]
        return BoundState(port.name, output, (1, *sizes[1:]), port.dtype)
    for layout in _LAYOUTS if len(port.shape) == len(wanted) else ():
        axes = [port.shape[axis] for axis in layout]
        if axes[1] in (None, wanted[1]) and axes[3] in (None, wanted[3]):
            length = axes[2]
            shape = [0, 0, 0, 0]
            for axis, size in zip(layout, (1, _size(wanted[1]), length or 0, _size(wanted[3])), strict=True):
                shape[axis] = size
            return BoundState(port.name, output, tuple(shape), port.dtype, length)
    raise CheckpointError(
        f"{where}: {port.name} has the shape {list(port.shape)}, "
        f"the {spec.kind} of layer {spec.layer} in the checkpoint {list(wanted)}",
        hint="give the checkpoint that the file was made from, or name the states with --bindings",
    )


def _size(size: int | str) -> int:
    return size if isinstance(size, int) else 1
