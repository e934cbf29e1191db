"""Ops that look up, write by index, or make tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.coreml.context import MIL_NAMES, NUMPY, Context, Var, integer, listed, number, rank, result_dtype
from moec.targets.coreml.lowerings.elementwise import Lowering

aten = torch.ops.aten


def _look_up(ctx: Context, source: Any, index: Any, axis: int) -> Var:
    return ctx.mb.gather(
        x=ctx.tensor(source), indices=ctx.tensor(index, torch.int32), axis=axis, validate_indices=ctx.constant(False)
    )


def _embedding(ctx: Context, node: fx.Node) -> Var:
    return _look_up(ctx, node.args[0], node.args[1], 0)


def _index_select(ctx: Context, node: fx.Node) -> Var:
    return _look_up(ctx, node.args[0], node.args[2], integer(node.args[1]))


def _index(ctx: Context, node: fx.Node) -> Var:
    source, indices = node.args
    used = [(axis, index) for axis, index in enumerate(listed(indices)) if index is not None]
    if len(used) != 1:
        raise ctx.refuse(node, "indexing by several tensors has no form")
    axis, index = used[0]
    return _look_up(ctx, source, index, axis)


def _gather(ctx: Context, node: fx.Node) -> Var:
    source, axis, index = node.args[:3]
    assert isinstance(source, fx.Node)
    return ctx.mb.gather_along_axis(
        x=ctx.tensor(source),
        indices=ctx.tensor(index, torch.int32),
        axis=integer(axis) % rank(source),
        validate_indices=ctx.constant(False),
    )


def _scatter(ctx: Context, node: fx.Node) -> Var:
    source, axis, index, updates = node.args[:4]
    assert isinstance(source, fx.Node)
    dtype = result_dtype(node)
    # Booleans travel as integers: a scatter takes none.
    carried = torch.int32 if dtype is torch.bool else dtype
    places = ctx.tensor(index, torch.int32)
    if isinstance(updates, fx.Node):
        values = ctx.tensor(updates, carried)
    else:
        values = ctx.mb.fill_like(ref_tensor=places, value=number(updates, carried))
    written = ctx.mb.scatter_along_axis(
        data=ctx.tensor(source, carried),
        indices=places,
        updates=values,
        axis=integer(axis) % rank(source),
        mode="update",
        validate_indices=ctx.constant(False),
    )
    return ctx.cast(written, MIL_NAMES[dtype])


_FILLS: Mapping[Any, int] = {
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_empty.default: 0,
    aten.empty.memory_format: 0,
}


def _full(ctx: Context, node: fx.Node) -> Var:
    sizes = listed(node.args[1] if isinstance(node.args[0], fx.Node) else node.args[0])
    fill = _FILLS[node.target] if node.target in _FILLS else node.args[1]
    name = MIL_NAMES[result_dtype(node)]
    if all(isinstance(size, int) for size in sizes):
        return ctx.constant(np.full(sizes, fill, dtype=NUMPY[name]))
    kind = "int32" if name == "bool" else name
    return ctx.cast(ctx.mb.fill(shape=ctx.dims(sizes), value=NUMPY[kind](fill)), name)


def _scalar(ctx: Context, node: fx.Node) -> Var:
    return ctx.constant(number(node.args[0], result_dtype(node)))


def _arange(ctx: Context, node: fx.Node) -> Var:
    dtype = result_dtype(node)
    bounds: list[Any] = [0, *node.args] if len(node.args) == 1 else list(node.args)
    start, stop, step = [*bounds, 1][:3]
    fixed = [bound for bound in (start, stop, step) if isinstance(bound, int | float)]
    if len(fixed) == 3:
        return ctx.constant(number(np.arange(*fixed), dtype))
    return ctx.mb.range_1d(start=ctx.tensor(start, dtype), end=ctx.tensor(stop, dtype), step=ctx.tensor(step, dtype))


TABLE: Mapping[Any, Lowering] = {
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.full.default: _full,
    aten.zeros.default: _full,
    aten.ones.default: _full,
    aten.new_empty.default: _full,
    aten.empty.memory_format: _full,
    aten.new_zeros.default: _full,
    aten.new_ones.default: _full,
    aten.scalar_tensor.default: _scalar,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
}
