"""Matrix products, convolutions and fused norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from moec.passes.decompose.builder import Builder, Rules
from moec.passes.rewriting import aten


def _matmul(b: Builder, self: fx.Node, other: fx.Node, **_: Any) -> fx.Node | None:
    """A vector becomes a matrix of one row or column; the added axis is removed from the result."""
    left, right = b.cast(self, b.dtype), b.cast(other, b.dtype)
    if b.node.target is aten.matmul.default and left is self and right is other and _rank(self) > 1 < _rank(other):
        return None
    row, column = _rank(left) == 1, _rank(right) == 1
    product = b(
        aten.matmul.default,
        b(aten.unsqueeze.default, left, 0) if row else left,
        b(aten.unsqueeze.default, right, 1) if column else right,
    )
    axes = [_rank(product) - 2] * row + [_rank(product) - 1] * column
    return b(aten.squeeze.dims, product, axes) if axes else product


def _rank(node: fx.Node) -> int:
    rank: int = node.meta["val"].ndim
    return rank


def _add_product(b: Builder, self: fx.Node, first: fx.Node, second: fx.Node, beta: Any = 1, alpha: Any = 1) -> fx.Node:
    """`beta * self + alpha * (first @ second)`."""
    product = b(aten.matmul.default, b.cast(first, b.dtype), b.cast(second, b.dtype))
    if alpha != 1:
        product = b(aten.mul.Tensor, product, alpha)
    if beta == 0:
        return product
    bias = b.cast(self, b.dtype)
    return b(aten.add.Tensor, product, bias if beta == 1 else b(aten.mul.Tensor, bias, beta))


def _native_layer_norm(
    b: Builder,
    source: fx.Node,
    shape: Sequence[int],
    weight: Any,
    bias: Any,
    eps: float,
) -> Sequence[fx.Node | None] | None:
    if any(user.args[1] != 0 for user in b.node.users):
        return None  # its statistics are used, which only happens in training
    return b(aten.layer_norm.default, source, shape, weight, bias, eps), None, None


RULES: Rules = {
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mv.default: _matmul,
    aten.addmm.default: _add_product,
    aten.baddbmm.default: _add_product,
    aten.native_layer_norm.default: _native_layer_norm,
}
