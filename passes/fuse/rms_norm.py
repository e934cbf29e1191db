"""Recognise RMSNorm (arXiv:1910.07467) in the variants that occur in model code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moec.compiler.ir.program import RMS_NORM, Program
from moec.passes.base import Pass, PassResult
from moec.passes.fuse.matches import fuse_each
from moec.passes.rewriting import CASTS, aten, call, is_call, last_axis, number, skip_casts, substitute


@dataclass(frozen=True)
class RmsNorm(Pass):
    """Fuse a root mean square norm into one `moec::rms_norm`.

    The square may be a power or a product; the inverse root may be `rsqrt`, a power of -0.5 or a division. Casts to
    float32 and back are part of the pattern, and so is a multiplication by a weight from either side, if there is one.

    ```
    %a = pow(%x, 2); %b = mean(%a, [-1], True); %c = add(%b, eps); %d = rsqrt(%c); %e = mul(%x, %d); %f = mul(@w, %e)
    ->
    %f = moec.rms_norm(%x, @w, eps)
    ```
    """

    name: ClassVar[str] = "rms-norm"
    requires: ClassVar[tuple[str, ...]] = ("normalize", "fold-weights")

    def run(self, program: Program) -> PassResult:
        """See the class."""
        return fuse_each(self.name, program, _fuse_at)


@dataclass(frozen=True, slots=True)
class _Norm:
    """A match: the input `source` and, from torch's own fused op, the `weight`."""

    source: fx.Node
    eps: float
    weight: fx.Node | None = None


def _fuse_at(graph: fx.Graph, node: fx.Node) -> bool | str:
    found = _match(node)
    if not isinstance(found, _Norm):
        return found or False
    _fuse(graph, node, found)
    return True


def _match(node: fx.Node) -> _Norm | str | None:
    """The norm that ends in `node` (before weight and casts); the reason why a near-match is not one; or None."""
    if is_call(node, aten.rms_norm.default):
        return _match_fused(node)
    for scaled, variance in _scalings(node):
        found = _mean_square(variance)
        if found is None:
            continue
        mean, eps = found
        source = _squared(mean.args[0])
        if source is None:
            continue
        if eps is None:
            return "its epsilon is not a number"
        if mean.args[2:3] != (True,) or not _over_last_axis(mean):
            return f"it takes the mean over the axes {mean.args[1]}, not over the last axis with keepdim"
        if skip_casts(source) is not skip_casts(scaled):
            return f"it scales %{scaled.name} by the mean square of %{source.name}"
        return _Norm(scaled, eps)
    return None


def _match_fused(node: fx.Node) -> _Norm | str:
    defaults = (None, None)
    source, axes, weight, eps = node.args + defaults[len(node.args) - 2 :]
    assert isinstance(source, fx.Node)
    assert isinstance(axes, list | tuple)
    if len(axes) != 1:
        return f"it normalises {len(axes)} axes"
    epsilon = torch.finfo(source.meta["val"].dtype).eps if eps is None else number(eps)
    if epsilon is None:
        return "its epsilon is not a number"
    return _Norm(source, epsilon, weight if isinstance(weight, fx.Node) else None)


def _scalings(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """All (x, v) such that `node` is x / sqrt(v)."""
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return
    first, second = node.args[:2]
    pairs = ((first, second), (second, first)) if node.target is aten.mul.Tensor else ((first, second),)
    under = _under_inverse_root if node.target is aten.mul.Tensor else _under_root
    for scaled, factor in pairs:
        if isinstance(scaled, fx.Node) and isinstance(factor, fx.Node):
            variance = under(skip_casts(factor))
            if variance is not None:
                yield scaled, variance


def _under_inverse_root(node: fx.Node) -> fx.Node | None:
    """The node v if `node` is 1 / sqrt(v), else None."""
    if is_call(node, aten.rsqrt.default):
        return _node(node.args[0])
    if is_call(node, aten.pow.Tensor_Scalar) and number(node.args[1]) == -0.5:
        return _node(node.args[0])
    if is_call(node, aten.reciprocal.default):
        root = _node(node.args[0])
        return None if root is None else _under_root(root)
    return None


def _under_root(node: fx.Node) -> fx.Node | None:
    """The node v if `node` is sqrt(v), else None."""
    if is_call(node, aten.sqrt.default) or (is_call(node, aten.pow.Tensor_Scalar) and number(node.args[1]) == 0.5):
        return _node(node.args[0])
    return None


def _mean_square(variance: fx.Node) -> tuple[fx.Node, float | None] | None:
    """The mean of squares and the epsilon whose sum is `variance`; the epsilon is None if it is not a number."""
    if is_call(variance, aten.mean.dim):
        return variance, 0.0
    if not is_call(variance, aten.add.Tensor) or variance.kwargs:
        return None
    first, second = variance.args[:2]
    for mean, eps in ((first, second), (second, first)):
        if is_call(mean, aten.mean.dim):
            assert isinstance(mean, fx.Node)
            return mean, number(eps)
    return None


def _squared(node: Any) -> fx.Node | None:
    """The node x if `node` is x * x, else None."""
    if is_call(node, aten.pow.Tensor_Scalar) and number(node.args[1]) == 2.0:
        return _node(node.args[0])
    if is_call(node, aten.square.default) or (is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1]):
        return _node(node.args[0])
    return None


def _over_last_axis(mean: fx.Node) -> bool:
    source, axes = _node(mean.args[0]), mean.args[1]
    assert source is not None
    return isinstance(axes, list | tuple) and len(axes) == 1 and last_axis(source, axes[0])


def _node(argument: Any) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _fuse(graph: fx.Graph, node: fx.Node, norm: _Norm) -> None:
    """Replace the norm, including the weight and casts that follow."""
    sources = {source.meta["val"].dtype: source for source in (norm.source, skip_casts(norm.source))}
    ends = [(node, norm.weight), *_continuations(node, norm)]
    end, weight = next((item for item in reversed(ends) if item[0].meta["val"].dtype in sources), (None, None))
    if end is None:
        return
    source = sources[end.meta["val"].dtype]
    with graph.inserting_before(end):
        fused = call(graph, RMS_NORM, source, weight, norm.eps, like=node)
    substitute(end, fused)


def _continuations(node: fx.Node, norm: _Norm) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """The casts and the multiplication by a weight that follow `node`, each with the weight applied so far."""
    weight = norm.weight
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not is_call(user, *CASTS):
            factor = _weight_factor(user, node) if weight is None else None
            if factor is None:
                return
            weight = factor
        node = user
        yield node, weight


def _weight_factor(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """The weight [H] by which `user` multiplies `node`, or None."""
    if not is_call(user, aten.mul.Tensor):
        return None
    factor = _node(user.args[1] if user.args[0] is node else user.args[0])
    if factor is None or factor.op != "get_attr":
        return None
    return factor if tuple(factor.meta["val"].shape) == (node.meta["val"].shape[-1],) else None
