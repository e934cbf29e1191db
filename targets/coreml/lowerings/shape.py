"""Ops that reshape and slice tensors; those common to all targets are in `moec.targets.common.lowerings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import expansion, integer, listed, node_of, rank, result_dtype
from moec.targets.coreml.context import Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering

aten = torch.ops.aten


def _reshape(ctx: Context, node: fx.Node) -> Var:
    value, target = ctx.tensor(node_of(node.args[0])), list(node.meta["val"].shape)
    fixed = [size if isinstance(size, int) else -1 for size in target]
    if fixed.count(-1) <= 1:
        return ctx.mb.reshape(x=value, shape=ctx.ints(*fixed))
    return ctx.mb.reshape(x=value, shape=ctx.dims(listed(node.args[1])))


def _expand(ctx: Context, node: fx.Node) -> Var:
    sizes = expansion(node)
    value, extra = ctx.tensor(node.args[0]), len(sizes) - rank(node.args[0])
    return ctx.tile(ctx.unsqueeze(value, range(extra)) if extra else value, sizes)


def cut(ctx: Context, value: Var, axis: int, start: Any, stop: Any, step: int = 1) -> Var:
    """`value[..., start:stop:step, ...]` along `axis`; a bound is an integer, None or the node of a size."""
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
    source, axis, start, stop, step = node.args
    assert isinstance(source, fx.Node)
    length = source.meta["val"].shape[integer(axis)]
    if isinstance(stop, int) and stop >= (length if isinstance(length, int) else np.iinfo(np.int32).max):
        stop = None
    return cut(ctx, ctx.tensor(source), integer(axis), start, stop, integer(step))


def _select(ctx: Context, node: fx.Node) -> Var:
    """One index along an axis, which is removed."""
    source, axis, index = node_of(node.args[0]), integer(node.args[1]), integer(node.args[2])
    length = source.meta["val"].shape[axis]
    start = index + length if index < 0 and isinstance(length, int) else index
    part = cut(ctx, ctx.tensor(source), axis, start, None if start == -1 else start + 1)
    return ctx.squeeze(part, [axis])


def _pad(ctx: Context, node: fx.Node) -> Var:
    source, pads = node_of(node.args[0]), [integer(pad) for pad in listed(node.args[1])]
    axes = len(pads) // 2
    # torch lists pads from the last axis on, MIL for all axes from the first on.
    widths = [0, 0] * (rank(source) - axes) + [w for at in reversed(range(axes)) for w in pads[2 * at : 2 * at + 2]]
    value = ctx.tensor(node.args[2], result_dtype(node))
    return ctx.mb.pad(x=ctx.tensor(source), pad=ctx.ints(*widths), mode="constant", constant_val=value)


TABLE: Mapping[Any, Lowering] = {
    aten.reshape.default: _reshape,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.constant_pad_nd.default: _pad,
}
