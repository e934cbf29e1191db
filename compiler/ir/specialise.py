"""Fix axes of a Program to constants, for targets that want static shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.compiler.common.errors import UnsupportedModelError, UsageError
from moec.compiler.ir.fake_values import fake_mode, infer, shape_and_dtype
from moec.compiler.ir.indexer import INDEXER
from moec.compiler.ir.operands import Attention, Indexer
from moec.compiler.ir.program import ATTENTION, Dim, Program, StateSpec, TensorSpec, module_of, moe_layers

_LENGTHS = ("sequence", "past_sequence", "total_sequence")

aten = torch.ops.aten
_MOVES = frozenset(
    {
        *(aten.slice.Tensor, aten.unsqueeze.default, aten.expand.default, aten.reshape.default),
        *(aten._to_copy.default, aten.permute.default),
    }
)
"""Ops whose result is all ones if their input is."""


def specialise(
    program: Program,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    past_sequence: int | None = None,
    total_sequence: int | None = None,
) -> Program:
    """Fix axes to constants; those that are None stay dynamic.

    Every fake value is inferred anew, and arithmetic on constant sizes is removed from the graph.

    Args:
        program: The Program; it is not changed.
        batch: Number of sequences.
        sequence: New tokens of a step.
        past_sequence: Tokens in the KV cache; may be 0.
        total_sequence: Sum of `sequence` and `past_sequence`; derived if both are given.

    Raises:
        UsageError: A size is not possible, or the axis is constant already.
    """
    given = {"batch": batch, "sequence": sequence, "past_sequence": past_sequence, "total_sequence": total_sequence}
    sizes = {axis: size for axis, size in given.items() if size is not None}
    _check(program, sizes)
    _derive(program, sizes)
    graph = reinfer_values(program, sizes)
    return program.replace(
        graph=graph,
        inputs=tuple(_fixed(spec, sizes) for spec in program.inputs),
        states=tuple(
            StateSpec(state.layer, state.kind, _fixed(state.input, sizes), _fixed(state.output, sizes))
            for state in program.states
        ),
        layers=moe_layers(graph),
        dims={axis: symbol for axis, symbol in program.dims.items() if axis not in sizes},
    )


def _check(program: Program, sizes: Mapping[str, int]) -> None:
    for axis, size in sizes.items():
        if axis not in program.dims:
            raise UsageError(
                f"the axis {axis} is constant already", hint=f"dynamic axes: {', '.join(program.dims) or 'none'}"
            )
        if size < (0 if axis == "past_sequence" else 1):
            raise UsageError(f"the axis {axis} cannot have size {size}")


def _derive(program: Program, sizes: dict[str, int]) -> None:
    """Derive the third of sequence, past and total if two are known.

    Raises:
        UsageError: They contradict each other.
    """
    known = {axis: size for axis in _LENGTHS if (size := sizes.get(axis, _constant(program, axis))) is not None}
    if len(known) == 2:
        (axis,) = set(_LENGTHS) - set(known)
        if axis == "total_sequence":
            size = known["sequence"] + known["past_sequence"]
        else:
            size = known["total_sequence"] - sum(known[other] for other in _LENGTHS[:2] if other in known)
        _check(program, {axis: size})
        sizes[axis] = size
    elif len(known) == 3 and known["sequence"] + known["past_sequence"] != known["total_sequence"]:
        raise UsageError(
            f"total_sequence {known['total_sequence']} is not sequence {known['sequence']} "
            f"+ past_sequence {known['past_sequence']}"
        )


def _constant(program: Program, axis: str) -> int | None:
    """The size of an axis that was fixed earlier, from an input or cache that has it; None if it is dynamic."""
    if axis in program.dims:
        return None
    position = {"sequence": ("input_ids", 1), "total_sequence": ("attention_mask", 1)}.get(axis)
    shapes = {spec.name: spec.shape for spec in program.inputs}
    if position is None:
        size = program.caches[0].input.shape[2] if program.caches else None
    else:
        size = shapes[position[0]][position[1]] if position[0] in shapes else None
    return size if isinstance(size, int) else None


def _fixed(spec: TensorSpec, sizes: Mapping[str, int]) -> TensorSpec:
    shape: tuple[Dim, ...] = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
    return TensorSpec(spec.name, shape, spec.dtype)


def reinfer_values(program: Program, sizes: Mapping[str, int]) -> fx.Graph:
    """Copy the graph and infer its fake values anew, node by node.

    Args:
        program: The Program; each axis name in its signature becomes one symbol.
        sizes: Axis -> number, for axes that become constant. Arithmetic on sizes that yields a number is removed.
    """
    specs = iter([*program.inputs, *(state.input for state in program.states)])
    mode = fake_mode(program.graph)
    graph, mapping = fx.Graph(), dict[fx.Node, Any]()
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(_mapped(node.args[0], mapping))
        elif node.op == "call_function":
            mapping[node] = _called(graph, node, mapping, mode)
        else:
            mapping[node] = graph.node_copy(node)
            if node.op == "placeholder":
                spec = next(specs)
                shape = [size if isinstance(size, int) else sizes.get(size, program.dims[size]) for size in spec.shape]
                with mode:
                    mapping[node].meta["val"] = torch.empty(shape, dtype=spec.dtype)
    return graph


def _mapped(argument: Any, mapping: Mapping[fx.Node, Any]) -> Any:
    return fx.map_arg(argument, lambda node: mapping[node])


def _called(graph: fx.Graph, node: fx.Node, mapping: Mapping[fx.Node, Any], mode: FakeTensorMode) -> fx.Node | int:
    """The call of `node` in the new graph, or a number if it computes a size that is now constant."""
    args, kwargs = _mapped(node.args, mapping), _mapped(node.kwargs, mapping)
    assert callable(node.target)
    value = infer(node.target, args, kwargs, mode)
    if isinstance(value, torch.SymInt) and value.node.expr.is_number:
        value = int(value.node.expr)
    if isinstance(value, int):
        return value
    new = graph.create_node("call_function", node.target, args, kwargs, node.name)
    new.meta = {**node.meta, "val": value}
    return new


def without_padding(program: Program) -> Program:
    """Remove the input `attention_mask`, for targets that run a single sequence without padding.

    The mask of such a sequence is all ones. Attention gets no mask, multiplications by the mask are removed, and sizes
    that are read from the mask are read from another input.

    Raises:
        UnsupportedModelError: The mask is used in another way.
    """
    graph = program.copy_graph()
    mask = next((node for node in graph.find_nodes(op="placeholder") if node.target == "attention_mask"), None)
    if mask is None:
        return program
    ones = {mask}
    for node in graph.nodes:
        if not ones.isdisjoint(node.all_input_nodes):
            _without_ones(node, ones)
    for node in reversed(list(graph.nodes)):
        if not node.users and not ones.isdisjoint(node.all_input_nodes):
            graph.erase_node(node)
    graph.erase_node(mask)
    inputs = tuple(spec for spec in program.inputs if spec.name != "attention_mask")
    return program.replace(graph=graph, inputs=inputs, layers=moe_layers(graph))


def _without_ones(node: fx.Node, ones: set[fx.Node]) -> None:
    """Make `node` independent of the nodes in `ones`, or add it to `ones` if it is all ones too.

    Raises:
        UnsupportedModelError: Neither is possible.
    """
    if node.target in (ATTENTION, INDEXER):
        mask = (Attention if node.target is ATTENTION else Indexer).of(node).attention_mask
        node.args = tuple(None if argument is mask else argument for argument in node.args)
    elif node.target in _MOVES:
        ones.add(node)
    elif node.target is aten.mul.Tensor and (kept := _unchanged(node, ones)) is not None:
        node.replace_all_uses_with(kept)
    elif node.target is aten.sym_size.int and (source := _of_same_size(node, ones)) is not None:
        node.args = source
    elif node.users:
        raise UnsupportedModelError(
            f"{module_of(node)}: %{node.name} uses the attention mask, so the mask cannot be removed",
            hint="a target that supports padding can build this model",
        )


def _of_same_size(size: fx.Node, ones: set[fx.Node]) -> tuple[fx.Node, int] | None:
    """Another input than the mask and its axis with the size `size`, or None."""
    for source in size.graph.find_nodes(op="placeholder"):
        if source not in ones:
            for axis, length in enumerate(source.meta["val"].shape):
                if str(length) == str(size.meta["val"]):
                    return source, axis
    return None


def _unchanged(product: fx.Node, ones: set[fx.Node]) -> fx.Node | None:
    """The factor that equals `product` in shape and dtype, the other factor being all ones; or None."""
    for factor in product.all_input_nodes:
        if factor not in ones and shape_and_dtype(factor) == shape_and_dtype(product):
            return factor
    return None
