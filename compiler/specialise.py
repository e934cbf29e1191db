"""Fix axes of a Program to constants, for targets that want static shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moec.compiler.errors import UnsupportedModelError, UsageError
from moec.compiler.program import ATTENTION, Dim, Program, StateSpec, TensorSpec, module_of, moe_layers

_MASK_ARGUMENT = 6
"""Position of `attention_mask` among the arguments of `moec::attention`."""


def specialise(
    program: Program,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    past_sequence: int | None = None,
    total_sequence: int | None = None,
) -> Program:
    """Make axes constant; those that are None stay dynamic.

    Every fake value is inferred anew, and arithmetic on sizes that became constant is gone from the graph.

    Args:
        program: It stays as it is.
        batch: Number of sequences.
        sequence: New tokens of a step.
        past_sequence: Tokens in the states; may be 0.
        total_sequence: Their sum; taken as that where both are given.

    Raises:
        UsageError: A size is impossible, or the axis is constant already.
    """
    given = {"batch": batch, "sequence": sequence, "past_sequence": past_sequence, "total_sequence": total_sequence}
    sizes = {axis: size for axis, size in given.items() if size is not None}
    _check(program, sizes)
    if "sequence" in sizes and "past_sequence" in sizes and "total_sequence" in program.dims:
        sizes["total_sequence"] = sizes["sequence"] + sizes["past_sequence"]
    symbols = {program.dims[axis].node.expr: size for axis, size in sizes.items()}
    graph = _Inference(program, symbols).run()
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
    total = sizes.get("total_sequence")
    if total is None:
        return
    parts = [sizes.get("sequence"), sizes.get("past_sequence")]
    if None not in parts and sum(part or 0 for part in parts) != total:
        raise UsageError(f"total_sequence {total} is not sequence {parts[0]} + past_sequence {parts[1]}")


def _fixed(spec: TensorSpec, sizes: Mapping[str, int]) -> TensorSpec:
    shape: tuple[Dim, ...] = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
    return TensorSpec(spec.name, shape, spec.dtype)


class _Inference:
    """Copies a graph with some symbols replaced by numbers, one node after the other."""

    def __init__(self, program: Program, symbols: Mapping[sympy.Symbol, int]) -> None:
        self.program, self.symbols = program, symbols
        self.graph = fx.Graph()
        self.mapping: dict[fx.Node, Any] = {}
        """Old node -> new node, or the number that its size has become."""
        self.mode = next(
            value.fake_mode
            for node in program.graph.nodes
            if isinstance(value := node.meta.get("val"), torch._subclasses.fake_tensor.FakeTensor)
        )

    def run(self) -> fx.Graph:
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.graph.output(self._mapped(node.args[0]))
            elif node.op == "call_function":
                self._call(node)
            else:
                new = self.graph.node_copy(node)
                if node.op == "placeholder":
                    new.meta["val"] = self._resized(node.meta["val"])
                self.mapping[node] = new
        return self.graph

    def _mapped(self, argument: Any) -> Any:
        return fx.map_arg(argument, lambda node: self.mapping[node])

    def _call(self, node: fx.Node) -> None:
        args, kwargs = self._mapped(node.args), self._mapped(node.kwargs)
        assert callable(node.target)
        with self.mode, torch.no_grad():
            value = node.target(*fx.map_arg(args, _value), **fx.map_arg(kwargs, _value))
        if isinstance(value, int):
            self.mapping[node] = value
            return
        if isinstance(value, torch.SymInt) and value.node.expr.is_number:
            self.mapping[node] = int(value.node.expr)
            return
        new = self.graph.create_node("call_function", node.target, args, kwargs, node.name)
        new.meta = {**node.meta, "val": value}
        self.mapping[node] = new

    def _resized(self, value: Tensor) -> Tensor:
        shape = [self._size(size) for size in value.shape]
        with self.mode:
            return torch.empty(shape, dtype=value.dtype)

    def _size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        if not isinstance(size, torch.SymInt):
            return size
        number = self.symbols.get(size.node.expr)
        return size if number is None else number


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def without_padding(program: Program) -> Program:
    """Drop the input `attention_mask`, for targets that run one sequence without padding at a time.

    Raises:
        UnsupportedModelError: Something other than attention reads the mask.
    """
    graph = program.copy_graph()
    mask = next((node for node in graph.find_nodes(op="placeholder") if node.target == "attention_mask"), None)
    if mask is None:
        return program
    for user in list(mask.users):
        if user.target is ATTENTION:
            user.update_arg(_MASK_ARGUMENT, None)
        elif user.users:
            raise UnsupportedModelError(
                f"{module_of(user)}: %{user.name} reads the attention mask, so that it cannot be left out",
                hint="build with a padding mask",
            )
        else:
            graph.erase_node(user)
    graph.erase_node(mask)
    inputs = tuple(spec for spec in program.inputs if spec.name != "attention_mask")
    return program.replace(graph=graph, inputs=inputs, layers=moe_layers(graph))
