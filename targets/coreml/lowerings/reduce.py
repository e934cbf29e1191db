"""Reductions, sorting and cumulative ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.targets.coreml.context import Context, Var, integer, rank, result_dtype, source_of
from moec.targets.coreml.lowerings.elementwise import Lowering

aten = torch.ops.aten


def _axes(node: fx.Node) -> list[int]:
    source = source_of(node)
    listed = node.args[1] if len(node.args) > 1 and node.args[1] is not None else range(rank(source))
    wanted = listed if isinstance(listed, list | tuple | range) else [listed]
    return [integer(axis) % rank(source) for axis in wanted]


def _keep(node: fx.Node) -> bool:
    return bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))


def _reduce(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        value = ctx.tensor(node.args[0], result_dtype(node))
        return getattr(ctx.mb, op_type)(x=value, axes=_axes(node), keep_dims=_keep(node))

    return lower


def _reduce_bool(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        value = ctx.tensor(node.args[0], torch.int32)
        return ctx.cast(getattr(ctx.mb, op_type)(x=value, axes=_axes(node), keep_dims=_keep(node)), "bool")

    return lower


def _arg(op_type: str) -> Lowering:
    def lower(ctx: Context, node: fx.Node) -> Var:
        axis = _axes(node)[-1] if len(node.args) > 1 else rank(source_of(node)) - 1
        return getattr(ctx.mb, op_type)(x=ctx.tensor(node.args[0]), axis=axis, keep_dims=_keep(node))

    return lower


def _max_dim(ctx: Context, node: fx.Node) -> Sequence[Var]:
    keep, value, axes = _keep(node), ctx.tensor(node.args[0]), _axes(node)
    values = ctx.mb.reduce_max(x=value, axes=axes, keep_dims=keep)
    return values, ctx.mb.reduce_argmax(x=value, axis=axes[0], keep_dims=keep)


def _softmax(ctx: Context, node: fx.Node) -> Var:
    return ctx.mb.softmax(x=ctx.tensor(node.args[0], result_dtype(node)), axis=integer(node.args[1]))


def _log_softmax(ctx: Context, node: fx.Node) -> Var:
    value, axis = ctx.tensor(node.args[0], result_dtype(node)), integer(node.args[1])
    return ctx.mb.sub(x=value, y=ctx.mb.reduce_log_sum_exp(x=value, axes=[axis], keep_dims=True))


def _ordered(ctx: Context, source: fx.Node, count: int, axis: int, *, largest: bool) -> Sequence[Var]:
    found: Sequence[Var] = ctx.mb.topk(x=ctx.tensor(source), k=np.int32(count), axis=axis, ascending=not largest)
    return found


def _topk(ctx: Context, node: fx.Node) -> Sequence[Var]:
    source, count, axis, largest = [*node.args, *(-1, True)[len(node.args) - 2 :]][:4]
    assert isinstance(source, fx.Node)
    return _ordered(ctx, source, integer(count), integer(axis) % rank(source), largest=bool(largest))


def _sort(ctx: Context, node: fx.Node) -> Sequence[Var]:
    source, axis, descending = [*node.args, *(-1, False)[len(node.args) - 1 :]][:3]
    assert isinstance(source, fx.Node)
    length = source.meta["val"].shape[integer(axis)]
    if not isinstance(length, int):
        raise ctx.refuse(node, "sorting along an axis of unknown length has no form")
    return _ordered(ctx, source, length, integer(axis) % rank(source), largest=bool(descending))


def _cumsum(ctx: Context, node: fx.Node) -> Var:
    axis = integer(node.args[1]) % rank(node)
    return ctx.mb.cumsum(x=ctx.tensor(node.args[0], result_dtype(node)), axis=axis)


def _vector_norm(ctx: Context, node: fx.Node) -> Var:
    order = node.args[1] if len(node.args) > 1 else 2
    if order not in (1, 2):
        raise ctx.refuse(node, f"a norm of order {order} has no form")
    axes = node.args[2] if len(node.args) > 2 else [-1]
    wanted = [integer(axis) for axis in (axes if isinstance(axes, list | tuple) else [axes])]
    keep = bool(node.args[3]) if len(node.args) > 3 else False
    op_type = "reduce_l1_norm" if order == 1 else "reduce_l2_norm"
    return getattr(ctx.mb, op_type)(x=ctx.tensor(node.args[0], result_dtype(node)), axes=wanted, keep_dims=keep)


TABLE: Mapping[Any, Lowering] = {
    aten.sum.dim_IntList: _reduce("reduce_sum"),
    aten.sum.default: _reduce("reduce_sum"),
    aten.mean.dim: _reduce("reduce_mean"),
    aten.mean.default: _reduce("reduce_mean"),
    aten.amax.default: _reduce("reduce_max"),
    aten.amin.default: _reduce("reduce_min"),
    aten.any.dim: _reduce_bool("reduce_max"),
    aten.all.dim: _reduce_bool("reduce_min"),
    aten.argmax.default: _arg("reduce_argmax"),
    aten.argmin.default: _arg("reduce_argmin"),
    aten.max.dim: _max_dim,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.cumsum.default: _cumsum,
    aten.norm.ScalarOpt_dim: _vector_norm,
    aten.linalg_vector_norm.default: _vector_norm,
}
