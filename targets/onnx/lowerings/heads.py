"""Heads side by side, [B, S, H * D]: as products write them and kernels of attention read them.

A Program has heads on an axis of their own, before the tokens. Where it only moves them there, and rotates them, the
kernels take them as they were before:

    Permute(Reshape(x), [0, 2, 1, 3]) -> moec::rotary -> moec::attention   =>   x -> RotaryEmbedding -> Attention
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.operands import Rotary
from moec.compiler.ir.program import ROTARY
from moec.targets.common.arguments import listed, result_dtype
from moec.targets.onnx.context import DTYPES, Context
from moec.targets.onnx.lowerings.norm import half_tables, takes_tables

aten = torch.ops.aten


def side_by_side(ctx: Context, node: fx.Node) -> ir.Value | None:
    """The value of a node [B, H, S, D] as [B, S, H * D]; None if it would have to be transposed for that."""
    _, heads, _, width = node.meta["val"].shape
    if node.target is aten.permute.default and listed(node.args[1]) == [0, 2, 1, 3]:
        (source,) = node.all_input_nodes
        return _joined(ctx, source, heads * width)
    rotated = _rotated(node)
    if rotated is None:
        return None
    rotary, whole = rotated
    flat = side_by_side(ctx, whole) if takes_tables(rotary) else None
    if flat is None:
        return None
    part = int(rotary.meta["val"].shape[3])
    attributes: dict[str, Any] = {"rotary_embedding_dim": part} if part < width else {}
    return ctx.op("RotaryEmbedding", flat, *half_tables(ctx, rotary), num_heads=int(heads), **attributes)


def apart(ctx: Context, like: fx.Node, value: ir.Value, width: int) -> ir.Value:
    """[B, S, H * width] -> [B, S, H, width], with B, H and S of a node [B, H, S, D]."""
    batch, heads, length, _ = like.meta["val"].shape
    # With its shape known, a reshape that joins the heads again is left out.
    value.type, value.shape = ir.TensorType(DTYPES[result_dtype(like)]), ctx.shape_of((batch, length, heads * width))
    return ctx.op("Reshape", value, ctx.ints(0, 0, int(heads), width))


def _joined(ctx: Context, node: fx.Node, width: int) -> ir.Value:
    """The value of a node [B, S, H, D] as [B, S, H * D]: often it was just reshaped from that."""
    if node.target is aten.reshape.default:
        (source, *_) = node.all_input_nodes
        if [str(size) for size in source.meta["val"].shape] == [*map(str, node.meta["val"].shape[:2]), str(width)]:
            return ctx.tensor(source)
    return ctx.op("Reshape", ctx.tensor(node), ctx.ints(0, 0, width))


def _rotated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The `moec::rotary` of a rotation and all columns of what it rotates; None if the node is no rotation.

    A partial one rotates the first columns and joins the others to them.
    """
    if node.target is ROTARY:
        return node, Rotary.of(node).x
    if node.target is not aten.cat.default or len(listed(node.args[0])) != 2 or node.args[1] != 3:
        return None
    rotary, rest = listed(node.args[0])
    if rotary.target is not ROTARY:
        return None
    first, part = Rotary.of(rotary).x, int(rotary.meta["val"].shape[3])
    if not (_is_slice(first, 0, part) and _is_slice(rest, part, None)) or first.args[0] is not rest.args[0]:
        return None
    whole: fx.Node = first.args[0]
    return (rotary, whole) if whole.meta["val"].shape[3] == node.meta["val"].shape[3] else None


def _is_slice(node: Any, start: int, stop: int | None) -> bool:
    """Whether a node is the columns from `start` to `stop`, or to the end, of a node with four axes."""
    if node.target is not aten.slice.Tensor or node.args[1] != 3 or node.args[4] != 1:
        return False
    last = int(node.args[0].meta["val"].shape[3])
    found = node.args[2], min(node.args[3], last)
    return found == (start, last if stop is None else stop)
