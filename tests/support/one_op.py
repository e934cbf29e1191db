"""Programs of a single op, for tests of every target and of the interpreter."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.compiler.ir.program import Program, TensorSpec
from moec.compiler.ir.specialise import specialise
from moec.compiler.ir.weights import Constant, LazyTensor, WeightStore
from moec.passes.decompose.decompose import Decompose


@dataclass(frozen=True)
class Size:
    """The size of a dynamic axis in the arguments of an op: a symbol in the graph, a number for torch."""

    name: str
    factor: int = 1

    def __mul__(self, factor: int) -> Size:
        return Size(self.name, self.factor * factor)


_NUMBERS = itertools.count()
"""Numbers for the names of weights, so that Programs that are built into one file share no names."""

SIZES = ((2, 5), (3, 4), (1, 1))
"""(batch, sequence) of the trace, and of two runs with other sizes."""


@dataclass(frozen=True)
class Weight:
    """An operand that is a weight of the Program, rather than an input."""

    value: Tensor


@dataclass(frozen=True)
class Axes:
    """The sizes for a case: `b` and `s` as numbers for shapes of tensors, `batch` and `sequence` for arguments."""

    b: int
    s: int
    batch: Size = Size("batch")
    sequence: Size = Size("sequence")

    def weight(self, value: Tensor) -> Weight:
        return Weight(value)


Arguments = Callable[[Axes], tuple[Any, ...]]
"""Axes -> arguments of an op; a mapping at the end holds keyword arguments."""


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (arguments[:-1], arguments[-1]) if arguments and isinstance(arguments[-1], dict) else (arguments, {})


class OneOp:
    """A Program with a single call; axes of its inputs that differ between SIZES are dynamic."""

    def __init__(self, target: Callable[..., Any], arguments: Arguments, output: int | None = None) -> None:
        self.target, self.arguments, self.output = target, arguments, output
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._graph = fx.Graph()
        self._inputs: list[TensorSpec] = []
        self._weights: dict[str, LazyTensor] = {}
        self._symbols = self._make_symbols()
        self._sizes: dict[Size, fx.Node] = {}
        self.program = self._program()
        """The Program as traced."""
        self.core = Decompose().run(self.program).program
        """The Program in core ops."""

    def static(self, batch: int, sequence: int) -> Program:
        """The Program in core ops, with static sizes."""
        return specialise(self.core, batch=batch, sequence=sequence)

    def expected(self, batch: int, sequence: int) -> Any:
        args, kwargs = self._concrete(batch, sequence)
        result = self.target(*args, **kwargs)
        return result if self.output is None else result[self.output]

    def feeds(self, batch: int, sequence: int) -> dict[str, np.ndarray]:
        args, kwargs = _split(self.arguments(Axes(batch, sequence)))
        tensors = [item for item in _flatten([args, kwargs]) if isinstance(item, Tensor)]
        return {f"x{index}": tensor.numpy() for index, tensor in enumerate(tensors)} | {
            "sizes": np.zeros((batch, sequence), np.float32)
        }

    def _concrete(self, batch: int, sequence: int) -> Any:
        numbers = {"batch": batch, "sequence": sequence}

        def plain(item: Any) -> Any:
            if isinstance(item, Size):
                return numbers[item.name] * item.factor
            return item.value if isinstance(item, Weight) else item

        return _map(plain, _split(self.arguments(Axes(batch, sequence))))

    def _make_symbols(self) -> dict[str, Any]:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
        sample = self._mode.from_tensor(torch.zeros(SIZES[0]), symbolic_context=context)
        node = self._node(self._graph.placeholder("sizes"), sample)
        self._inputs.append(TensorSpec("sizes", ("batch", "sequence"), torch.float32))
        self._anchor = node
        return dict(zip(("batch", "sequence"), sample.shape, strict=True))

    def _node(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta = {"val": value, "module": "the.module"}
        return node

    def _size(self, size: Size) -> fx.Node:
        if size not in self._sizes:
            axis = ("batch", "sequence").index(size.name)
            node = self._graph.call_function(torch.ops.aten.sym_size.int, (self._anchor, axis))
            self._node(node, self._symbols[size.name])
            if size.factor != 1:
                product = self._graph.call_function(operator.mul, (node, size.factor))
                node = self._node(product, self._symbols[size.name] * size.factor)
            self._sizes[size] = node
        return self._sizes[size]

    def _input(self, tensor: Tensor, other: Tensor) -> fx.Node:
        names = dict(zip(zip(*SIZES[:2], strict=True), ("batch", "sequence"), strict=True))
        shape = [a if a == b else names[a, b] for a, b in zip(tensor.shape, other.shape, strict=True)]
        name = f"x{len(self._inputs) - 1}"
        with self._mode:
            fake = torch.empty([self._symbols.get(size, size) for size in shape], dtype=tensor.dtype)
        self._inputs.append(TensorSpec(name, tuple(shape), tensor.dtype))
        return self._node(self._graph.placeholder(name), fake)

    def _weight(self, weight: Weight) -> fx.Node:
        name = f"weight{next(_NUMBERS)}"
        self._weights[name] = Constant(weight.value)
        with self._mode:
            fake = torch.empty(weight.value.shape, dtype=weight.value.dtype)
        return self._node(self._graph.create_node("get_attr", name), fake)

    def _program(self) -> Program:
        first, second = (_split(self.arguments(Axes(*sizes))) for sizes in SIZES[:2])
        others = iter([item for item in _flatten(list(second)) if isinstance(item, Tensor)])

        def node(item: Any) -> Any:
            if isinstance(item, Tensor):
                return self._input(item, next(others))
            return self._weight(item) if isinstance(item, Weight) else item

        args, kwargs = _map(node, first)
        args, kwargs = _map(lambda item: self._size(item) if isinstance(item, Size) else item, (args, kwargs))
        call = self._graph.call_function(self.target, tuple(args), dict(kwargs))
        fake_args, fake_kwargs = fx.map_arg((tuple(args), dict(kwargs)), lambda n: n.meta["val"])
        with self._mode:
            self._node(call, self.target(*fake_args, **fake_kwargs))
        if self.output is not None:
            item = self._graph.call_function(operator.getitem, (call, self.output))
            call = self._node(item, call.meta["val"][self.output])
        self._graph.output((call,))
        # Inputs were added where they are used, but placeholders must come first.
        for placeholder in self._graph.find_nodes(op="placeholder")[::-1]:
            next(iter(self._graph.nodes)).prepend(placeholder)
        return Program(
            self._graph, WeightStore(self._weights), tuple(self._inputs), (), (), torch.float32, {}, self._symbols
        )


def _map(function: Callable[[Any], Any], item: Any) -> Any:
    if isinstance(item, list | tuple):
        return type(item)(_map(function, value) for value in item)
    if isinstance(item, dict):
        return {key: _map(function, value) for key, value in item.items()}
    return function(item)


def _flatten(item: Any) -> list[Any]:
    if isinstance(item, list | tuple):
        return [leaf for value in item for leaf in _flatten(value)]
    if isinstance(item, dict):
        return [leaf for value in item.values() for leaf in _flatten(value)]
    return [item]
