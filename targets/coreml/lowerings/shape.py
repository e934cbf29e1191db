"""Ops that move, cut and join tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.coreml.context import Context, Var, integer, listed, rank, result_dtype, source_of
from moec.targets.coreml.lowerings.elementwise import Lowering

aten = torch.ops.aten


def _reshape(ctx: Context, node: fx.Node) -> Var:
    value, target = ctx.tensor(source_of(node)), list(node.meta["val"].shape)
    fixed = [size if isinstance(size, int) else -1 for size in target]
    if fixed.count(-1) <= 1:
        return ctx.mb.reshape(x=value, shape=ctx.ints(*fixed))
    sizes = node.args[1]
    if node.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        raise ctx.refuse(node, "a change of shape with several unknown sizes has no form")
    return ctx.mb.reshape(x=value, shape=ctx.dims(listed(sizes)))


def _permute(ctx: Context, node: fx.Node) -> Var:
    source = source_of(node)
    axes = [integer(axis) % rank(source) for axis in listed(node.args[1])]
    return ctx.mb.transpose(x=ctx.tensor(source), perm=ctx.ints(*axes))


def _transpose(ctx: Context, node: fx.Node) -> Var:
    source = source_of(node)
    perm = list(range(rank(source)))
    if node.target is aten.t.default:
        perm.reverse()
    else:
        first, second = (integer(axis) % rank(source) for axis in node.args[1:3])
        perm[first], perm[second] = perm[second], perm[first]
    return ctx.mb.transpose(x=ctx.tensor(source), perm=ctx.ints(*perm))


def _unsqueeze(ctx: Context, node: fx.Node) -> Var:
    return ctx.mb.expand_dims(x=ctx.tensor(node.args[0]), axes=ctx.ints(integer(node.args[1]) % rank(node)))


def _squeeze(ctx: Context, node: fx.Node) -> Var:
    source = source_of(node)
    axes = node.args[1] if len(node.args) > 1 else [i for i, s in enumerate(source.meta["val"].shape) if s == 1]
    given = axes if isinstance(axes, list | tuple) else [axes]
    wanted = [integer(axis) % rank(source) for axis in given if source.meta["val"].shape[axis] == 1]
    return ctx.mb.squeeze(x=ctx.tensor(source), axes=ctx.ints(*wanted)) if wanted else ctx.tensor(source)


def tile(ctx: Context, value: Var, reps: Sequence[Any]) -> Var:
    """Repeat along each axis. Booleans travel as integers, since `tile` takes none."""
    if all(times == 1 for times in reps):
        return value
    kind = ctx.type_name(value)
    carried = ctx.cast(value, "int32") if kind == "bool" else value
    return ctx.cast(ctx.mb.tile(x=carried, reps=ctx.dims(reps)), kind)


def _expand(ctx: Context, node: fx.Node) -> Var:
    source, sizes = source_of(node), listed(node.args[1])
    value, extra = ctx.tensor(source), len(sizes) - rank(source)
    if extra:
        value = ctx.mb.expand_dims(x=value, axes=ctx.ints(*range(extra)))
    old = [1] * extra + list(source.meta["val"].shape)
    reps = [
        1 if size == -1 or str(new) == str(before) else size
        for size, before, new in zip(sizes, old, node.meta["val"].shape, strict=True)
    ]
    return tile(ctx, value, reps)


def _repeat(ctx: Context, node: fx.Node) -> Var:
    source, times = source_of(node), listed(node.args[1])
    value, extra = ctx.tensor(source), len(times) - rank(source)
    if extra:
        value = ctx.mb.expand_dims(x=value, axes=ctx.ints(*range(extra)))
    return tile(ctx, value, times)


def _repeat_interleave(ctx: Context, node: fx.Node) -> Var:
    source, times = source_of(node), integer(node.args[1])
    axis = integer(node.args[2]) % rank(source)
    reps = [1] * (rank(source) + 1)
    reps[axis + 1] = times
    repeated = tile(ctx, ctx.mb.expand_dims(x=ctx.tensor(source), axes=ctx.ints(axis + 1)), reps)
    fixed = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if fixed.count(-1) > 1:
        raise ctx.refuse(node, "repeat_interleave over several unknown sizes has no form")
    return ctx.mb.reshape(x=repeated, shape=ctx.ints(*fixed))


def cut(ctx: Context, value: Var, axis: int, start: Any, stop: Any, step: int = 1) -> Var:
    """`value[..., start:stop:step, ...]` along `axis`; a bound is a number, None or the node of a size."""
    axes = len(value.shape)
    begin, end, stride = [0] * axes, [0] * axes, [1] * axes
    begin[axis], end[axis], stride[axis] = start or 0, 0 if stop is None else stop, step
    whole = [position != axis for position in range(axes)]
    open_end = [position != axis or stop is None for position in range(axes)]
    return ctx.mb.slice_by_index(
        x=value,
        begin=ctx.dims(begin),
        end=ctx.dims(end),
        stride=ctx.ints(*stride),
        begin_mask=ctx.constant(whole),
        end_mask=ctx.constant(open_end),
    )


def _slice(ctx: Context, node: fx.Node) -> Var:
    source, axis, start, stop, step = [*node.args, *(None,) * 5][:5]
    assert isinstance(source, fx.Node)
    position = integer(axis or 0) % rank(source)
    length = source.meta["val"].shape[position]
    if isinstance(stop, int) and stop >= (length if isinstance(length, int) else np.iinfo(np.int32).max):
        stop = None
    return cut(ctx, ctx.tensor(source), position, start, stop, integer(step or 1))


def _select(ctx: Context, node: fx.Node) -> Var:
    source, axis, index = source_of(node), integer(node.args[1]), node.args[2]
    return take(ctx, source, integer(axis) % rank(source), integer(index))


def take(ctx: Context, source: fx.Node, axis: int, index: int) -> Var:
    """One index along `axis`, which disappears."""
    length = source.meta["val"].shape[axis]
    start = index + length if index < 0 and isinstance(length, int) else index
    part = cut(ctx, ctx.tensor(source), axis, start, None if start == -1 else start + 1)
    return ctx.mb.squeeze(x=part, axes=ctx.ints(axis))


def _concat(ctx: Context, node: fx.Node) -> Var:
    axis = integer(node.args[1]) if len(node.args) > 1 else 0
    parts = [ctx.tensor(item, result_dtype(node)) for item in listed(node.args[0])]
    return ctx.mb.concat(values=parts, axis=axis % rank(node))


def _stack(ctx: Context, node: fx.Node) -> Var:
    axis = integer(node.args[1]) % rank(node) if len(node.args) > 1 else 0
    return ctx.mb.stack(values=[ctx.tensor(item, result_dtype(node)) for item in listed(node.args[0])], axis=axis)


def _split(ctx: Context, node: fx.Node) -> Sequence[Var]:
    source = source_of(node)
    axis = integer(node.args[2]) if len(node.args) > 2 else 0
    sizes = [part.shape[axis] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        raise ctx.refuse(node, "a split into pieces of unknown size has no form")
    if len(sizes) == 1:
        return [ctx.tensor(source)]
    parts: Sequence[Var] = ctx.mb.split(x=ctx.tensor(source), split_sizes=sizes, axis=axis % rank(source))
    return parts


def _unbind(ctx: Context, node: fx.Node) -> Sequence[Var]:
    source = source_of(node)
    axis = integer(node.args[1]) % rank(source) if len(node.args) > 1 else 0
    return [take(ctx, source, axis, index) for index in range(len(node.meta["val"]))]


def _getitem(ctx: Context, node: fx.Node) -> Any:
    source, index = node.args
    return ctx.get(source)[index]


def _slice_scatter(ctx: Context, node: fx.Node) -> Var:
    target, source, axis, start, stop, step = [*node.args, *(None,) * 6][:6]
    assert isinstance(target, fx.Node)
    position = integer(axis or 0) % rank(target)
    length = target.meta["val"].shape[position]
    if step not in (None, 1) or not isinstance(length, int):
        raise ctx.refuse(node, "writing to every n-th slice, or along an axis of unknown length, has no form")
    first = integer(start or 0)
    last = length if stop is None else min(integer(stop), length)
    whole, value = ctx.tensor(target), ctx.tensor(source, result_dtype(node))
    before = [cut(ctx, whole, position, 0, first)] if first else []
    after = [cut(ctx, whole, position, last, None)] if last < length else []
    parts = [*before, value, *after]
    return value if len(parts) == 1 else ctx.mb.concat(values=parts, axis=position)


def _pad(ctx: Context, node: fx.Node) -> Var:
    source, pads = source_of(node), [integer(pad) for pad in listed(node.args[1])]
    axes = len(pads) // 2
    # torch counts axes from the last one, MIL from the first, over all axes.
    widths = [0, 0] * (rank(source) - axes) + [w for at in reversed(range(axes)) for w in pads[2 * at : 2 * at + 2]]
    fill = node.args[2] if len(node.args) > 2 else 0
    value = ctx.tensor(fill, result_dtype(node))
    return ctx.mb.pad(x=ctx.tensor(source), pad=ctx.ints(*widths), mode="constant", constant_val=value)


def _copy(ctx: Context, node: fx.Node) -> Var:
    target, source = node.args[:2]
    assert isinstance(target, fx.Node)
    assert isinstance(source, fx.Node)
    if [str(size) for size in source.meta["val"].shape] != [str(size) for size in target.meta["val"].shape]:
        raise ctx.refuse(node, "a copy that repeats its source has no form")
    return ctx.tensor(source, result_dtype(node))


TABLE: Mapping[Any, Lowering] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _concat,
    aten.concat.default: _concat,
    aten.stack.default: _stack,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    operator.getitem: _getitem,
    aten.slice_scatter.default: _slice_scatter,
    aten.copy.default: _copy,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
}
