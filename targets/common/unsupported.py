"""What a target does not support of a Program, by its declarations: kinds of states, formats of caches and weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program
from moec.quantize.lazy import Coded

if TYPE_CHECKING:
    from moec.targets.base import Target, TargetOptions


def unsupported(target: Target, program: Program, options: TargetOptions) -> Iterator[Rejection]:
    """One rejection for each kind or format that `target` does not support with these options."""
    yield from _states(target, program)
    yield from _caches(target, program, options)
    yield from _formats(target, program)


def _states(target: Target, program: Program) -> Iterator[Rejection]:
    carried = ", ".join(sorted(target.state_kinds))
    for kind in sorted({state.kind for state in program.states} - target.state_kinds):
        layers = [state.layer for state in program.states if state.kind == kind]
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        reason = f"a state of kind {kind} is not supported here; layers may keep states of the kinds {carried}"
        yield Rejection(target.name, f"layer {layers[0]}{more}", reason)


def _caches(target: Target, program: Program, options: TargetOptions) -> Iterator[Rejection]:
    held, users = target.cache_formats(options), dict[str, list[str]]()
    for state in program.caches:
        form = str(state.input.dtype).removeprefix("torch.")
        if not state.input.dtype.is_floating_point and form not in held:
            users.setdefault(form, []).append(state.input.name)
    for form, names in users.items():
        reason = f"{form} ({len(names)} states) is not supported here; keys and values are kept in floats"
        yield Rejection(target.name, names[0], reason)


def _formats(target: Target, program: Program) -> Iterator[Rejection]:
    users, scale_types = dict[str, list[str]](), target.scale_types_of(program)
    for name in program.weight_names():
        tensor = program.weights[name]
        if not isinstance(tensor, Coded):
            continue
        kind = str(tensor.format).partition(":")[0]
        if kind not in target.weight_formats or tensor.format.scale_type not in scale_types:
            users.setdefault(str(tensor.format), []).append(name)
    known = f"{', '.join(sorted(target.weight_formats))} with scales of {' or '.join(sorted(scale_types))}"
    if scale_types != target.scale_types:
        known += f" where activations are {str(program.dtype).removeprefix('torch.')}"
    for form, names in users.items():
        reason = f"{form} ({len(names)} weights) is not supported here; weights may be {known}"
        yield Rejection(target.name, names[0], reason)
