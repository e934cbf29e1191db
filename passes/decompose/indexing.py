"""Reading and writing elements by index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moec.passes.decompose.builder import Builder, Rules
from moec.passes.rewriting import aten


def _embedding(b: Builder, weight: fx.Node, indices: fx.Node, *_: Any) -> fx.Node | None:
    """Drop the other arguments, which only concern training."""
    unused = (-1, False, False)
    return None if b.node.args[2:] == unused else b(aten.embedding.default, weight, indices, *unused)


def _index_select(b: Builder, self: fx.Node, dim: int, index: fx.Node) -> fx.Node:
    axis = b.axis(self, dim)
    return b(aten.index.Tensor, self, [*[None] * axis, index])


def _index(b: Builder, self: fx.Node, indices: Sequence[fx.Node | None]) -> fx.Node | None:
    """Normalise indexing by one integer tensor; indexing by masks or by several tensors is not decomposed."""
    used = [index for index in indices if index is not None]
    if len(used) != 1 or used[0].meta["val"].dtype == torch.bool or indices[-1] is not None:
        return None
    return b(aten.index.Tensor, self, list(indices[: list(indices).index(used[0]) + 1]))


def _gather(b: Builder, self: fx.Node, dim: int, index: fx.Node, sparse_grad: bool = False) -> fx.Node | None:  # noqa: ARG001
    axis = b.axis(self, dim)
    return None if axis == dim else b(aten.gather.default, self, axis, index)


def _take_along(b: Builder, self: fx.Node, indices: fx.Node, dim: int | None = None) -> fx.Node | None:
    return None if dim is None else b(aten.gather.default, self, b.axis(self, dim), indices)


def _scatter(b: Builder, self: fx.Node, dim: int, index: fx.Node, src: Any) -> fx.Node | None:
    axis = b.axis(self, dim)
    value = b.cast(src, b.dtype) if isinstance(src, fx.Node) else b.full(b.sizes(index), src, b.dtype)
    done = b.node.target is aten.scatter.src and value is src and axis == dim
    return None if done else b(aten.scatter.src, self, axis, index, value)


RULES: Rules = {
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.take_along_dim.default: _take_along,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
}
