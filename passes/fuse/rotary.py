"""Recognise rotary position embeddings (arXiv:2104.09864) in the variants that occur in model code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from moec.compiler.ir.program import ROTARY, Program
from moec.passes.base import Pass, PassResult
from moec.passes.fuse.matches import fuse_each
from moec.passes.fuse.rotary_tables import full_table, half_of, has_equal_halves
from moec.passes.fuse.rotation_halves import EVEN_ODD, HALVES, Part, part_of
from moec.passes.rewriting import aten, call, is_call, substitute, tensor_shape

INT_MAX = (1 << 63) - 1


@dataclass(frozen=True)
class Rotary(Pass):
    """Fuse a rotation of the last axis by tables of cosines and sines into one `moec::rotary`.

    Four variants are recognised: `x * cos + rotated(x) * sin`, where `rotated` concatenates the negated second half and
    the first half, or interleaves the negated odd and the even elements; and the same formula for the two parts
    separately, which are then concatenated or interleaved. For interleaved variants, the elements are reordered into
    halves before and back after the op. A partial rotation is a rotation of a slice.

    ```
    %a = mul(%x, %cos); %b = cat([neg(slice(%x, -1, 32)), slice(%x, -1, 0, 32)], -1); %y = add(%a, mul(%b, %sin))
    ->
    %y = moec.rotary(%x, %cos, %sin)
    ```
    """

    name: ClassVar[str] = "rotary"
    requires: ClassVar[tuple[str, ...]] = ("normalize", "common-subexpressions", "real-rotary")

    def run(self, program: Program) -> PassResult:
        """See the class."""
        return fuse_each(self.name, program, _fuse_at)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """A match: parts taken in the style of `part` are rotated and joined in `style`.

    `whole`: whether the tables have the width of the input, rather than half of it.
    """

    part: Part
    cosine: fx.Node
    sine: fx.Node
    style: str
    whole: bool
    shape: Any = None
    """With style EVEN_ODD: the size arguments of the reshape that merges pairs into one axis."""


def _fuse_at(graph: fx.Graph, node: fx.Node) -> bool | str:
    found = _match(node)
    return _rewrite(graph, node, found) or True if isinstance(found, _Rotation) else found or False


def _match(node: fx.Node) -> _Rotation | str | None:
    """The rotation that ends in `node`; the reason why a near-match is not one; or None."""
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        return _match_whole(node)
    if is_call(node, aten.cat.default, aten.reshape.default):
        joined = _joined(node)
        return None if joined is None else _match_parts(*joined)
    return None


def _joined(node: fx.Node) -> tuple[fx.Node, fx.Node, str, Any] | None:
    """The two parts that `node` joins along the last axis, the style, and the sizes of a final reshape."""
    rank = node.meta["val"].ndim
    if is_call(node, aten.cat.default):
        parts, axis, style, shape = node.args[0], node.args[1] if len(node.args) > 1 else 0, HALVES, None
        if axis not in (-1, rank - 1):
            return None
    else:
        stack = node.args[0]
        if not is_call(stack, aten.stack.default):
            return None
        assert isinstance(stack, fx.Node)
        parts, axis, style, shape = stack.args[0], stack.args[1] if len(stack.args) > 1 else 0, EVEN_ODD, node.args[1]
        sizes = tensor_shape(stack)
        if axis not in (-1, rank) or sizes is None or tensor_shape(node) != (*sizes[:-2], 2 * sizes[-2]):
            return None
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    first, second = parts
    return (first, second, style, shape) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None


def _match_whole(node: fx.Node) -> _Rotation | str | None:
    """Match `x * cos + rotated(x) * sin`."""
    for straight, crossed in (node.args[:2], node.args[1::-1]):
        for rotated, sine in _factors(crossed):
            found = _rotated(rotated)
            if found is None:
                continue
            if isinstance(found, str):
                return found
            part, style, shape = found
            for source, cosine in _factors(straight):
                if part.is_of(source):
                    return _Rotation(Part(source, part.style, part.index), cosine, sine, style, True, shape)
            return "the other summand is not the same input times a table"
    return None


def _rotated(node: fx.Node) -> tuple[Part, str, Any] | str | None:
    """If `node` is `rotated(x)`: the first part of x, the style, and the sizes of a final reshape."""
    if not is_call(node, aten.cat.default, aten.reshape.default):
        return None
    joined = _joined(node)
    if joined is None:
        return None
    negated, kept, style, shape = joined
    if not is_call(negated, aten.neg.default):
        return None
    second, first = part_of(negated.args[0]), part_of(kept)
    if second is None or first is None or second.source is not first.source:
        return _unequal(negated.args[0], kept)
    if (first.style, second.style, first.index, second.index) != (style, style, 0, 1):
        return "it joins the parts of its input in an order that is not a rotation"
    return first, style, shape


def _unequal(second: Any, first: Any) -> str | None:
    """The reason for a rejection if two slices of a tensor are not its halves, else None."""
    slices = [item for item in (second, first) if is_call(item, aten.slice.Tensor)]
    if len(slices) == 2 and slices[0].args[0] is slices[1].args[0]:
        widths = [item.meta["val"].shape[-1] for item in reversed(slices)]
        return f"the parts of its input have different widths: {widths[0]} and {widths[1]}"
    return None


def _match_parts(low: fx.Node, high: fx.Node, style: str, shape: Any) -> _Rotation | None:
    """Match (x1 * cos - x2 * sin, x2 * cos + x1 * sin), joined in `style`."""
    if not is_call(low, aten.sub.Tensor) or not is_call(high, aten.add.Tensor) or low.kwargs or high.kwargs:
        return None
    for first, cosine in _factors(low.args[0]):
        for second, sine in _factors(low.args[1]):
            one, two = part_of(first), part_of(second)
            if one is None or two is None or one.source is not two.source or one.style != two.style:
                continue
            if (one.index, two.index) == (0, 1) and _is_sum(high, (second, cosine), (first, sine)):
                return _Rotation(one, cosine, sine, style, False, shape)
    return None


def _is_sum(node: fx.Node, first: tuple[fx.Node, fx.Node], second: tuple[fx.Node, fx.Node]) -> bool:
    """Whether `node` adds the two products, in any order."""
    left, right = ([set(pair) for pair in _factors(argument)] for argument in node.args[:2])
    one, two = set(first), set(second)
    return (one in left and two in right) or (two in left and one in right)


def _factors(argument: Any) -> list[tuple[fx.Node, fx.Node]]:
    """The factors of a product of two tensors, in both orders."""
    if not is_call(argument, aten.mul.Tensor):
        return []
    first, second = argument.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return []
    return [(first, second), (second, first)]


def _rewrite(graph: fx.Graph, node: fx.Node, found: _Rotation) -> str | None:
    """Replace the rotation by one op; returns the reason if it cannot be replaced."""
    if found.whole and found.style == HALVES and not all(map(has_equal_halves, (found.cosine, found.sine))):
        return "the two halves of its tables may differ"
    problem = _layout_problem(node, found)
    if problem:
        return problem
    with graph.inserting_before(node):
        tables = [_table(graph, table, found, node) for table in (found.cosine, found.sine)]
        if None in tables:
            return "the elements of its tables may not come in equal pairs"
        swap = _swapped(node, found.cosine)
        source = found.part.whole(graph, node)
        if found.part.style == EVEN_ODD:
            parts = [call(graph, aten.slice.Tensor, source, -1, start, INT_MAX, 2, like=node) for start in (0, 1)]
            source = call(graph, aten.cat.default, parts, -1, like=node)
        operands = [source, *(table for table in tables if table is not None)]
        if swap:
            operands = [call(graph, aten.transpose.int, operand, 1, 2, like=node) for operand in operands]
        result = call(graph, ROTARY, *operands, like=node)
        if swap:
            result = call(graph, aten.transpose.int, result, 1, 2, like=node)
        if found.style == EVEN_ODD:
            half = node.meta["val"].shape[-1] // 2
            bounds = ((0, half), (half, INT_MAX))
            parts = [call(graph, aten.slice.Tensor, result, -1, *bound, like=node) for bound in bounds]
            pairs = call(graph, aten.stack.default, parts, -1, like=node)
            result = call(graph, aten.reshape.default, pairs, found.shape, like=node)
    substitute(node, result)
    return None


def _table(graph: fx.Graph, table: fx.Node, found: _Rotation, node: fx.Node) -> fx.Node | None:
    """The table in the width of the input, with equal halves; None if that cannot be derived."""
    if not found.whole:
        return full_table(graph, table, node)
    if found.style == HALVES:
        return table
    half = half_of(graph, table, node)
    return None if half is None else full_table(graph, half, node)


def _layout_problem(node: fx.Node, found: _Rotation) -> str | None:
    """Why the tables do not fit the op, which needs [B or 1, 1, S, D] or [B or 1, S, 1, D] for [B, heads, S, D]."""
    value, dtype = node.meta["val"], found.part.source.meta["val"].dtype
    for table in (found.cosine, found.sine):
        other = table.meta["val"]
        if other.dtype != dtype:
            return f"its tables are {other.dtype}, but its input is {dtype}"
        if other.ndim != 4 or value.ndim != 4 or 1 not in (other.shape[1], other.shape[2]):
            return f"its tables have shape {list(other.shape)} for an input of shape {list(value.shape)}"
    return None


def _swapped(node: fx.Node, table: fx.Node) -> bool:
    """Whether heads come after positions: the tables are [B, S, 1, D]."""
    own, shape = tensor_shape(node), tensor_shape(table)
    assert own is not None
    assert shape is not None
    return bool(shape[1] != 1 or (shape[2] == 1 and own[2] != 1))
