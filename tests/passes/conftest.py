"""Small programs built by hand, and two families captured once, for the tests of passes."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moec.compiler.ir.fake_values import infer
from moec.compiler.ir.interpreter import Interpreter
from moec.compiler.ir.program import Program, TensorSpec, moe_layers
from moec.compiler.ir.weights import Constant, LazyTensor, WeightStore


class Builder:
    """Builds a Program of static shapes, one node after the other."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.inputs: list[TensorSpec] = []
        self.feeds: dict[str, Tensor] = {}
        self.weights: dict[str, LazyTensor] = {}

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        generator = torch.Generator().manual_seed(len(self.inputs))
        self.feeds[name] = torch.randn(shape, generator=generator).to(dtype)
        self.inputs.append(TensorSpec(name, shape, dtype))
        return self._with_value(self.graph.placeholder(name), self.feeds[name])

    def weight(self, name: str, value: Tensor | LazyTensor) -> fx.Node:
        self.weights[name] = Constant(value) if isinstance(value, Tensor) else value
        shape, dtype = self.weights[name].shape, self.weights[name].dtype
        return self._with_value(self.graph.create_node("get_attr", name), torch.empty(shape, dtype=dtype))

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {"val": infer(target, args, kwargs, self.mode), "module": "block"}
        return node

    def program(self, result: fx.Node) -> Program:
        self.graph.output((result,))
        store = WeightStore(self.weights)
        return Program(
            self.graph, store, tuple(self.inputs), (), moe_layers(self.graph), torch.float32, config={}, dims={}
        )

    def _with_value(self, node: fx.Node, value: Tensor) -> fx.Node:
        with self.mode:
            node.meta = {"val": torch.empty(value.shape, dtype=value.dtype), "module": ""}
        return node

    def assert_same(self, before: Program, after: Program, tolerance: float = 1e-6) -> None:
        """Both programs give the same result on the inputs, up to `tolerance` of its largest value."""
        want, got = (Interpreter(program).run(self.feeds)["logits"].float() for program in (before, after))
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.fixture
def build() -> Builder:
    return Builder()


FAMILIES = ("mixtral", "deepseek_v2")


@pytest.fixture(scope="session")
def captured(capture_of: Callable[..., Program]) -> Mapping[str, Program]:
    """A plain family, and one with complex rotary tables, slice writes and group-limited routing."""
    return {family: capture_of(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def feeds() -> Callable[[Program, int, int, int], dict[str, Tensor]]:
    """Random feeds of a captured program: batch, new tokens and past tokens."""

    def make(program: Program, batch: int, sequence: int, past: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        sizes = {"batch": batch, "past_sequence": past}
        values = {
            "input_ids": torch.randint(3, program.vocab_size, (batch, sequence), generator=generator),
            "attention_mask": torch.ones(batch, past + sequence, dtype=torch.int64),
            "position_ids": torch.arange(past, past + sequence).expand(batch, -1),
            "cache_position": torch.arange(past, past + sequence),
        }
        for state in program.states:
            shape = [sizes[size] if isinstance(size, str) and size in sizes else size for size in state.input.shape]
            values[state.input.name] = torch.randn(shape, generator=generator)
        return values

    return make
