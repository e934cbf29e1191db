"""Rewrite writes into a part of a tensor as element-wise choices (`where`) between two tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moec.compiler.ir.fake_values import fake_mode
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import Constant, LazyTensor
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import Rewrite, add_weight, aten, call, is_call, size_of, substitute, tensor_shape


@dataclass(frozen=True)
class MaskedWrites(Pass):
    """Turn writes by a mask, or of the same slice of another tensor, into choices; reads skip writes to other elements.

    ```
    %a = index_put(%x, [%mask], 7)                           ->  masked_fill(%x, %mask, 7)
    %b = slice_scatter(%x, slice(%y, 2, 1, 9, 3), 2, 1, 9, 3)  ->  where(gt(%ones_at_1_4_7, 0.5), %y, %x)
    %c = select(select_scatter(%x, %y, 0, 1), 0, 1)          ->  %y
    %d = select(select_scatter(%x, %y, 0, 1), 0, 2)          ->  select(%x, 0, 2)
    ```
    """

    name: ClassVar[str] = "masked-writes"
    requires: ClassVar[tuple[str, ...]] = ("normalize",)

    def run(self, program: Program) -> PassResult:
        """See the class."""
        rewrite, modified = Rewrite(program), False
        for node in list(rewrite.graph.nodes):
            if node.op == "call_function":
                modified |= _read_past(node) or _fill(program, node) or _choose(node, rewrite.added)
        return rewrite.result(modified=modified)


def _read_past(node: fx.Node) -> bool:
    """Replace a read of a written element by the value, and a read of another one by a read before the write."""
    if not (is_call(node, aten.select.int) and is_call(node.args[0], aten.select_scatter.default)):
        return False
    write, axis, index = node.args[:3]
    assert isinstance(write, fx.Node)
    rank, size = write.meta["val"].ndim, size_of(write.meta["val"].shape[_number(axis)])
    if _number(axis) % rank != _number(write.args[2]) % rank or not isinstance(size, int):
        return False
    if _number(index) % size == _number(write.args[3]) % size:
        assert isinstance(write.args[1], fx.Node)
        substitute(node, write.args[1])
    else:
        with node.graph.inserting_before(node):
            before = call(node.graph, aten.select.int, write.args[0], axis, index, like=node)
        substitute(node, before)
        _read_past(before)
    return True


def _fill(program: Program, node: fx.Node) -> bool:
    """Rewrite the write of a number where a mask is true."""
    if not is_call(node, aten.index_put.default) or (len(node.args) > 3 and node.args[3]):
        return False
    target, indices, value = node.args[:3]
    if not isinstance(indices, list | tuple) or len(indices) != 1 or not isinstance(value, fx.Node):
        return False
    (mask,) = indices
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
        return False
    stored = program.weights[str(value.target)] if value.op == "get_attr" else None
    if not isinstance(stored, Constant) or stored.value.numel() != 1 or tensor_shape(mask) != tensor_shape(target):
        return False
    with node.graph.inserting_before(node):
        filled = call(node.graph, aten.masked_fill.Scalar, target, mask, stored.value.item(), like=node)
    substitute(node, filled)
    return True


def _choose(node: fx.Node, constants: dict[str, LazyTensor]) -> bool:
    """Rewrite the write of a slice of another tensor to the same slice."""
    if not is_call(node, aten.slice_scatter.default):
        return False
    target, written = node.args[:2]
    if is_call(written, aten.copy.default):
        written = written.args[1]  # type: ignore[union-attr]
    if not is_call(written, aten.slice.Tensor):
        return False
    assert isinstance(written, fx.Node)
    other, value = written.args[0], node.meta["val"]
    assert isinstance(other, fx.Node)
    place, same_dtype = _slice(node, 2), other.meta["val"].dtype == value.dtype
    if not (same_dtype and tensor_shape(other) == tensor_shape(node) and place == _slice(written, 1)):
        return False
    axis, *bounds = place
    size = size_of(value.shape[axis])
    if not isinstance(size, int):
        return False
    mask = torch.zeros(size)
    mask[slice(*bounds)] = 1.0
    name = f"elements_{axis}_{size}_" + "_".join(map(str, bounds))
    shaped = mask.view(-1, *[1] * (value.ndim - 1 - axis))
    constants[name] = Constant(shaped)
    graph = node.graph
    with graph.inserting_before(node):
        kept = add_weight(graph, name, node)
        with fake_mode(graph):
            kept.meta["val"] = torch.empty(shaped.shape)
        chosen = call(graph, aten.gt.Scalar, kept, 0.5, like=node)
        result = call(graph, aten.where.self, chosen, other, target, like=node)
    substitute(node, result)
    return True


def _slice(node: fx.Node, first: int) -> tuple[int, int, int | None, int]:
    """Axis, start, stop and step of a slice whose axis is argument `first`."""
    defaults: tuple[Any, ...] = (0, 0, None, 1)
    given: tuple[Any, ...] = node.args[first:]
    axis, start, stop, step = (*given, *defaults[len(given) :])
    rank: int = node.meta["val"].ndim
    return int(axis) % rank, int(start or 0), stop, int(step)


def _number(argument: Any) -> int:
    assert isinstance(argument, int)
    return argument
