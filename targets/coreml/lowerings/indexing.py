"""Ops that read or write by index, or create tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.common.arguments import integer, listed, node_of, rank, result_dtype
from moec.targets.coreml.context import MIL_NAMES, NUMPY, Context, Var, number
from moec.targets.coreml.lowerings.elementwise import Lowering
from moec.targets.coreml.lowerings.shape import cut

aten = torch.ops.aten


def _embedding(ctx: Context, node: fx.Node) -> Var:
    rows = ctx.tensor(node.args[1], torch.int32)
    return ctx.mb.gather(x=ctx.tensor(node.args[0]), indices=rows, axis=0, validate_indices=ctx.constant(False))


def _gather(ctx: Context, node: fx.Node) -> Var:
    source, axis, index = node.args
    return ctx.mb.gather_along_axis(
        x=ctx.tensor(source),
        indices=ctx.tensor(index, torch.int32),
        axis=integer(axis),
        validate_indices=ctx.constant(False),
    )


def _scatter(ctx: Context, node: fx.Node) -> Var:
    source, axis, index, updates = node.args
    dtype = result_dtype(node)
    # A scatter does not take booleans: they are cast to integers and back.
    carried = torch.int32 if dtype is torch.bool else dtype
    places = ctx.tensor(index, torch.int32)
    written = ctx.mb.scatter_along_axis(
        data=_resized_operand(ctx, source, places, integer(axis), carried),
        indices=places,
        updates=_resized_operand(ctx, updates, places, integer(axis), carried),
        axis=integer(axis),
        mode="update",
        validate_indices=ctx.constant(False),
    )
    return ctx.cast(written, MIL_NAMES[dtype])


def _resized_operand(ctx: Context, argument: fx.node.Argument, places: Var, axis: int, dtype: torch.dtype) -> Var:
    """An operand of a scatter along `axis`, which must have the sizes of `places` along all other axes.

    A filled tensor that several layers share has the symbolic size of a tensor in one of them, and MIL cannot know that
    the sizes in the others are equal. Such a tensor is therefore filled again, with the sizes of `places`.
    """
    node = node_of(argument)
    if node.target is not aten.full.default or isinstance(node.args[1], fx.Node) or _known(node):
        return ctx.tensor(argument, dtype)
    column = cut(ctx, places, axis, 0, 1)
    value = NUMPY[MIL_NAMES[dtype]](node.args[1])
    filled = ctx.mb.fill_like(ref_tensor=column, value=value)
    return ctx.tile(filled, [node.meta["val"].shape[axis] if other == axis else 1 for other in range(rank(node))])


def _known(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in node.meta["val"].shape)


def _full(ctx: Context, node: fx.Node) -> Var:
    sizes, fill = listed(node.args[0]), node.args[1]
    name = MIL_NAMES[result_dtype(node)]
    if isinstance(fill, fx.Node):
        value = ctx.tensor(fill, result_dtype(node))
        return value if not sizes else ctx.mb.tile(x=ctx.mb.reshape(x=value, shape=ctx.ints(1)), reps=ctx.dims(sizes))
    if all(isinstance(size, int) for size in sizes):
        return ctx.constant(np.broadcast_to(number(fill, result_dtype(node)), sizes).astype(NUMPY[name]))
    kind = "int32" if name == "bool" else name
    filled = _filled_like(ctx, sizes, NUMPY[kind](fill))
    if filled is None:
        filled = ctx.mb.fill(shape=ctx.dims(sizes), value=NUMPY[kind](fill))
    return ctx.cast(filled, name)


def _filled_like(ctx: Context, sizes: list[Any], fill: Any) -> Var | None:
    """`fill` in the shape `sizes`, if one size is symbolic and is that of a tensor's axis; else None.

    MIL's `fill` would get a new symbolic size, which MIL does not know to equal that of the tensor.
    """
    unknown = [axis for axis, size in enumerate(sizes) if isinstance(size, fx.Node)]
    if len(unknown) != 1 or sizes[unknown[0]].target is not aten.sym_size.int:
        return None
    source, axis = sizes[unknown[0]].args
    line = ctx.tensor(source)
    line = ctx.cast(line, "int32") if ctx.type_name(line) == "bool" else line
    others = [other for other in range(rank(source)) if other != axis]
    for other in others:
        line = cut(ctx, line, other, 0, 1)
    line = ctx.mb.squeeze(x=line, axes=ctx.ints(*others)) if others else line
    line = ctx.mb.fill_like(ref_tensor=line, value=fill)
    added = [place for place in range(len(sizes)) if place not in unknown]
    column = ctx.mb.expand_dims(x=line, axes=ctx.ints(*added)) if added else line
    return ctx.tile(column, [1 if place in unknown else size for place, size in enumerate(sizes)])


def _arange(ctx: Context, node: fx.Node) -> Var:
    bounds: list[Any] = list(node.args)
    dtype = result_dtype(node)
    if not any(isinstance(bound, fx.Node) for bound in bounds):
        return ctx.constant(number(np.arange(*bounds), dtype))
    start, stop, step = (ctx.tensor(bound, dtype) for bound in bounds)
    return ctx.mb.range_1d(start=start, end=stop, step=step)


TABLE: Mapping[Any, Lowering] = {
    aten.embedding.default: _embedding,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.full.default: _full,
    aten.arange.start_step: _arange,
}
