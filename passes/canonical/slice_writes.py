"""Replace a tensor that is filled slice by slice by one `cat`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program, module_of
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import Rewrite, aten, call, is_call, size_of, substitute, tensor_shape

_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    stop: int
    source: fx.Node


@dataclass(frozen=True)
class SliceWrites(Pass):
    """Turn an empty tensor that is filled slice by slice along one axis into a concatenation of the slices.

    ```
    %e = new_empty(..); %a = slice_scatter(%e, copy(slice(%e, 3, 0, 16), %x), 3, 0, 16)
    %b = slice_scatter(%a, copy(slice(%a, 3, 16), %y), 3, 16)
    ->
    %b = cat([%x, %y], 3)
    ```
    """

    name: ClassVar[str] = "slice-writes"
    requires: ClassVar[tuple[str, ...]] = ("normalize",)

    def run(self, program: Program) -> PassResult:
        """See the class."""
        rewrite, modified = Rewrite(program), False
        graph = rewrite.graph
        for node in list(graph.nodes):
            # The last write of a chain yields the complete tensor.
            if not is_call(node, aten.slice_scatter.default) or _written_on(node):
                continue
            found = _pieces(node)
            if isinstance(found, str):
                rewrite.rejections.append(Rejection(self.name, module_of(node), found))
                continue
            with graph.inserting_before(node):
                joined = call(graph, aten.cat.default, [piece.source for piece in found], _axis(node), like=node)
            substitute(node, joined)
            modified = True
        return rewrite.result(modified=modified)


def _written_on(node: fx.Node) -> bool:
    return any(is_call(user, aten.slice_scatter.default) and user.args[0] is node for user in node.users)


def _axis(node: fx.Node) -> int:
    axis: Any = node.args[2] if len(node.args) > 2 else 0
    rank: int = node.meta["val"].ndim
    return int(axis) % rank


def _pieces(node: fx.Node) -> list[_Piece] | str:
    """The pieces of the tensor along the axis of the last write, in order; or why it cannot be rewritten."""
    axis = _axis(node)
    size = size_of(node.meta["val"].shape[axis])
    if not isinstance(size, int):
        return "the size of the axis that it is written along is dynamic"
    pieces: list[_Piece] = []
    write: Any = node
    while is_call(write, aten.slice_scatter.default):
        if _axis(write) != axis:
            return "it is written along more than one axis"
        defaults = (0, None, None, 1)
        _, start, stop, step = write.args[2:] + defaults[len(write.args) - 2 :]
        taken = range(size)[slice(start, stop, step)]
        if step != 1 or any(piece.start < taken.stop and taken.start < piece.stop for piece in pieces):
            return "its slices overlap or leave gaps"
        source = _written(write)
        if source is None:
            return "a slice of it is filled by broadcasting"
        pieces.append(_Piece(taken.start, taken.stop, source))
        write = write.args[0]
    if not is_call(write, *_EMPTY):
        return "it is written over another tensor"
    pieces.sort(key=lambda piece: piece.start)
    if [piece.start for piece in pieces] != [0, *(piece.stop for piece in pieces[:-1])] or pieces[-1].stop != size:
        return "its slices do not cover it"
    return pieces


def _written(write: fx.Node) -> fx.Node | None:
    """The tensor that is written to a slice, or None if the write changes its shape or dtype."""
    source = write.args[1]
    assert isinstance(source, fx.Node)
    own = source
    if is_call(source, aten.copy.default):
        value = source.args[1]
        assert isinstance(value, fx.Node)
        source = value
    same = tensor_shape(source) == tensor_shape(own) and source.meta["val"].dtype == own.meta["val"].dtype
    return source if same else None
