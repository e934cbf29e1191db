"""Programs of tiny models, calls of single ops, and the `.tflite` files that they are lowered to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moec import passes
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import Constant, LazyTensor, WeightStore
from moec.passes.decompose.decompose import decompose
from moec.targets.common.table import lookup
from moec.targets.tflite import lower
from moec.targets.tflite.context import Context, Settings, Shared
from moec.targets.tflite.library import module
from moec.targets.tflite.lowerings.table import TABLE
from moec.targets.tflite.model import Graph, Model, Value
from moec.targets.tflite.runner import TfliteRunner
from moec.targets.tflite.weights import Weights
from moec.targets.tflite.writer import write
from tests.support.one_op import OneOp

Operation = tuple[Any, ...]
"""An op, its arguments, and a mapping of keyword arguments if it has any; a LazyTensor argument is a weight."""


@dataclass(frozen=True)
class Build:
    """Writes Programs and single calls as files, and opens them."""

    directory: Path

    def file(
        self,
        program: Program,
        *,
        lengths: Sequence[int] = (1, 16),
        capacity: int = 96,
        branches: bool = True,
    ) -> Path:
        model, _ = lower.build(program, lengths=lengths, capacity=capacity, branches=branches)
        return self.model(model)

    def model(self, model: Model) -> Path:
        path = self.directory / "model.tflite"
        write(model, path, lambda *_: None)
        return path

    def runner(self, program: Program, **settings: Any) -> TfliteRunner:
        return TfliteRunner(self.file(program, **settings), threads=1)

    def calls(
        self, operations: Mapping[str, Operation], *, branches: bool = True, capacity: int = 8
    ) -> dict[str, list[np.ndarray]]:
        """Results of calls, all run as signatures of one file."""
        weights = {
            f"weight{id(item)}": item
            for operation in operations.values()
            for item in operation
            if isinstance(item, LazyTensor)
        }
        program = Program(fx.Graph(), WeightStore(weights), (), (), (), torch.float32, {}, {})
        shared, model, feeds, known = Shared(program, Weights(program)), Model(), {}, {}
        for name, operation in operations.items():
            ctx = Context(shared, Settings(capacity, branches), Graph(name))
            feeds[name] = dict[str, np.ndarray]()
            results = _lower(ctx, operation, feeds[name])
            if any(isinstance(result, Tensor) for result in results):
                known[name] = [result.numpy() for result in results]
                continue
            for index, result in enumerate(results):
                ctx.graph.output(f"out{index}", result)
            model.signatures[name] = ctx.graph
        return known | self._results(model, feeds)

    def one_ops(self, cases: Mapping[str, OneOp], sizes: tuple[int, int]) -> dict[str, list[np.ndarray] | Exception]:
        """Results of Programs of one op, of fixed sizes, all run as signatures of one file, or what went wrong."""
        model, feeds, known = Model(), {}, dict[str, Any]()
        for name, one in cases.items():
            program = one.static(*sizes)
            ctx = Context(Shared(program, Weights(program)), Settings(8, True), Graph(name))
            feeds[name] = dict[str, np.ndarray]()
            try:
                (result,) = lower_graph(ctx, program.graph, one.feeds(*sizes), feeds[name])
            except Exception as error:  # noqa: BLE001 - the case of this op fails, the others run
                known[name] = error
                continue
            if isinstance(result, Tensor):
                known[name] = [result.numpy()]
                continue
            ctx.graph.output("out0", result)
            model.signatures[name] = ctx.graph
        return known | self._results(model, feeds)

    def _results(self, model: Model, feeds: Mapping[str, dict[str, np.ndarray]]) -> dict[str, Any]:
        known = dict[str, Any]()
        interpreter = module("ai_edge_litert.interpreter").Interpreter(str(self.model(model)), num_threads=1)
        for name in model.signatures:
            try:
                found = interpreter.get_signature_runner(name)(**feeds[name])
                known[name] = [found[f"out{index}"] for index in range(len(found))]
            except RuntimeError as error:
                known[name] = error
        return known


def _lower(ctx: Context, operation: Operation, feeds: dict[str, np.ndarray]) -> list[Value | Tensor]:
    """Lower one call in the graph of `ctx`, in core ops, with an input for every tensor among its arguments."""
    target, *arguments = operation
    kwargs = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    graph, mode = fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    values: dict[str, np.ndarray] = {}

    def argument(value: Any) -> Any:
        if isinstance(value, list):
            return [argument(item) for item in value]
        if isinstance(value, LazyTensor):
            node = graph.get_attr(f"weight{id(value)}")
            node.meta["val"] = mode.from_tensor(value.read(), static_shapes=True)
            return node
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"in{len(values)}")
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        values[node.name] = value.numpy()
        return node

    args = [argument(value) for value in arguments]
    fake = fx.map_arg((tuple(args), kwargs), lambda node: node.meta["val"])
    with mode:
        value = target(*fake[0], **fake[1])
    call = graph.call_function(target, tuple(args), kwargs)
    call.meta["val"] = value
    graph.output((call,))
    decompose(graph.nodes)
    return lower_graph(ctx, graph, values, feeds)


KINDS = {"float32": "FLOAT32", "int32": "INT32", "bool": "BOOL"}


def lower_graph(
    ctx: Context, graph: fx.Graph, values: Mapping[str, np.ndarray], feeds: dict[str, np.ndarray]
) -> list[Value | Tensor]:
    """Lower a graph of static shapes, with an input for each placeholder; what is to be fed goes into `feeds`."""
    for node in graph.nodes:
        if node.op == "placeholder":
            array = values[node.name]
            feeds[node.name] = fed = array.astype(np.int32) if array.dtype == np.int64 else array
            ctx.bind(node, ctx.graph.input(node.name, fed.shape, KINDS[fed.dtype.name]))
        elif node.op == "call_function":
            constant = node.all_input_nodes and lower._is_constant(ctx, node)
            constant = constant or node.target in (torch.ops.aten.full.default, torch.ops.aten.arange.start_step)
            ctx.set(node, lower._constant(ctx, node) if constant else lookup(TABLE, node, "tflite")(ctx, node))
    (results,) = graph.output_node().args
    found = [ctx.get(result) for result in results]  # type: ignore[union-attr]
    return [item for result in found for item in (result if isinstance(result, list | tuple) else [result])]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


@pytest.fixture(scope="session")
def program_of(golden_model: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Program]:
    """The Program of "golden" or of a tiny model of a family, with the common passes run; captured once."""

    @functools.cache
    def program(name: str) -> Program:
        checkpoint = Checkpoint.open(str(golden_model if name == "golden" else tiny_checkpoint(name)))
        return passes.run_passes(capture(checkpoint), passes.default_passes())[0]

    return program


@pytest.fixture(scope="session")
def weight() -> Callable[[Tensor], LazyTensor]:
    """A tensor as a weight of a Program."""
    return Constant
