"""Constant folding: what is computed from weights alone becomes a lazy weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.derived_weights import Reshaped, permute, slice_axis
from moec.compiler.ir.program import Program, module_of
from moec.compiler.ir.weights import Computed, LazyTensor, Mapped, WeightStore, concatenate
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import add_weight, aten, rewritten

GROWTH_BYTES = 1 << 16
"""A result is not folded if it is larger than this and than all weights that it is computed from."""

Folder = Callable[[fx.Node, LazyTensor], LazyTensor | None]


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Replace every computation on weights and numbers by a derived weight. No weight is read for it.

    Results of reshapes, transpositions, slices, concatenations and casts can be read one row (one expert) at a time;
    other results are computed as a whole when they are read.

    ```
    %a = reshape(@w1, [E, I, H]); %b = reshape(@v1, [E, I, H]); %c = cat([%a, %b], 1); experts(.., %c, ..)
    ->
    experts(.., @experts.cat, ..)
    ```
    """

    name: ClassVar[str] = "fold-weights"

    def run(self, program: Program) -> PassResult:
        """See the class."""
        graph = program.copy_graph()
        folding = _Folding(program.weights)
        for node in graph.nodes:
            folding.visit(node)
        added: dict[str, LazyTensor] = {}
        for node, tensor in folding.folded.items():
            if node.op == "get_attr" or all(user in folding.folded for user in node.users):
                continue
            name = _free_name(node, program.weights, added)
            added[name] = tensor
            with graph.inserting_before(node):
                weight = add_weight(graph, name, node)
            # Users that are folded themselves disappear with their own users, so their arguments need no update.
            node.replace_all_uses_with(weight, delete_user_cb=lambda user: user not in folding.folded)
        for node in reversed(folding.folded):
            if not node.users and node.op != "get_attr":
                graph.erase_node(node)
        rejections = tuple(folding.rejections)
        if not added:
            return PassResult(program, modified=False, rejections=rejections)
        return PassResult(rewritten(program, graph, program.weights.with_tensors(added)), True, rejections)


def _free_name(node: fx.Node, store: WeightStore, added: Mapping[str, LazyTensor]) -> str:
    """Name of a derived weight: the module and the op that computed it, with a number if that name is taken."""
    op = str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else "value"
    module = node.meta.get("module", "")
    base = name = f"{module}.{op}" if module else op
    count = 1
    while name in store or name in added:
        name = f"{base}_{count}"
        count += 1
    return name


@dataclass
class _Folding:
    """The weights that visited nodes were folded to."""

    store: WeightStore
    folded: dict[fx.Node, LazyTensor] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    def visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.folded[node] = self.store[str(node.target)].cast(node.meta["val"].dtype)
        elif self._foldable(node):
            tensor = self._structured(node) or _computed(node, self.folded)
            sources = sum(self.folded[source].nbytes for source in node.all_input_nodes)
            if tensor.nbytes > max(sources, GROWTH_BYTES):
                reason = f"{node.target} would turn {sources} into {tensor.nbytes} bytes of weights"
                self.rejections.append(Rejection(FoldWeights.name, module_of(node), reason))
            else:
                self.folded[node] = tensor

    def _foldable(self, node: fx.Node) -> bool:
        target, value = node.target, node.meta.get("val")
        if not isinstance(target, torch._ops.OpOverload) or not isinstance(value, Tensor):
            return False
        if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
            return False
        if not all(isinstance(size, int) for size in value.shape):
            return False
        if target is aten.full.default and value.ndim == 0:
            return False  # a number: other passes need to see its value
        return all(source in self.folded for source in node.all_input_nodes)

    def _structured(self, node: fx.Node) -> LazyTensor | None:
        """The folded tensor, if it can be read row by row; else None."""
        if node.target is aten.cat.default:
            return self._joined(node)
        inputs = node.all_input_nodes
        if len(inputs) != 1 or node.args[0] is not inputs[0]:
            return None
        source = self.folded[inputs[0]]
        folder = _FOLDERS.get(node.target)
        if folder is not None:
            return folder(node, source)
        assert isinstance(node.target, torch._ops.OpOverload)
        value = node.meta["val"]
        if torch.Tag.pointwise in node.target.tags and source.shape and tuple(value.shape) == source.shape:
            return Mapped(source, _function_of(node), source.shape, value.dtype)
        return None

    def _joined(self, node: fx.Node) -> LazyTensor | None:
        parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        value = node.meta["val"]
        assert isinstance(parts, list | tuple)
        assert isinstance(axis, int)
        sources = [self.folded[part].cast(value.dtype) for part in parts if isinstance(part, fx.Node)]
        return concatenate(sources, axis % value.ndim) if all(source.shape for source in sources) else None


def _function_of(node: fx.Node) -> Callable[..., Tensor]:
    """`node` as a function of its input tensors, in the order of `all_input_nodes`."""
    names = {source: position for position, source in enumerate(node.all_input_nodes)}
    target, args, kwargs = node.target, node.args, node.kwargs
    assert callable(target)

    def function(*values: Tensor) -> Tensor:
        def given(source: fx.Node) -> Any:
            return values[names[source]]

        result: Tensor = target(*fx.map_arg(args, given), **fx.map_arg(kwargs, given))
        return result

    return function


def _computed(node: fx.Node, folded: Mapping[fx.Node, LazyTensor]) -> LazyTensor:
    value = node.meta["val"]
    sources = tuple(folded[source] for source in node.all_input_nodes)
    return Computed(sources, _function_of(node), tuple(value.shape), value.dtype)


def _reshaped(node: fx.Node, source: LazyTensor) -> LazyTensor:
    return Reshaped(source, tuple(node.meta["val"].shape))


def _cast(node: fx.Node, source: LazyTensor) -> LazyTensor:
    return source.cast(node.meta["val"].dtype)


def _transposed(node: fx.Node, source: LazyTensor) -> LazyTensor:
    order = list(range(len(source.shape)))
    first, second = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, 1)
    assert isinstance(first, int)
    assert isinstance(second, int)
    order[first], order[second] = order[second], order[first]
    return permute(source, order)


def _transposed_matrix(node: fx.Node, source: LazyTensor) -> LazyTensor:  # noqa: ARG001
    return permute(source, tuple(reversed(range(len(source.shape)))))


def _permuted(node: fx.Node, source: LazyTensor) -> LazyTensor:
    order = node.args[1]
    assert isinstance(order, list | tuple)
    return permute(source, [int(axis) for axis in order])  # type: ignore[arg-type]


def _sliced(node: fx.Node, source: LazyTensor) -> LazyTensor | None:
    defaults = (0, None, None, 1)
    axis, start, stop, step = node.args[1:] + defaults[len(node.args) - 1 :]
    if step != 1 or not isinstance(axis, int):
        return None
    axis %= len(source.shape)
    first, last, _ = slice(start, stop).indices(source.shape[axis])
    return slice_axis(source, axis, first, max(first, last))


def _selected(node: fx.Node, source: LazyTensor) -> LazyTensor:
    axis, index = node.args[1], node.args[2]
    assert isinstance(axis, int)
    assert isinstance(index, int)
    axis, index = axis % len(source.shape), index % source.shape[axis]
    return Reshaped(slice_axis(source, axis, index, index + 1), tuple(node.meta["val"].shape))


_FOLDERS: dict[Any, Folder] = {
    **dict.fromkeys(
        (
            aten.reshape.default,
            aten.view.default,
            aten._unsafe_view.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.flatten.using_ints,
        ),
        _reshaped,
    ),
    aten._to_copy.default: _cast,
    aten.transpose.int: _transposed,
    aten.t.default: _transposed_matrix,
    aten.permute.default: _permuted,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
}
