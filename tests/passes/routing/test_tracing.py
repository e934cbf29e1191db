"""Every policy traces into operations that all targets have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from moec.passes.routing.policies.base import Policy, select
from tests.support.policies import POLICIES

if TYPE_CHECKING:
    from torch import Tensor

ALLOWED = {
    *("_to_copy", "abs", "add", "amax", "arange", "bitwise_and", "bitwise_or", "clamp", "div", "eq", "floor"),
    *("ge", "gt", "le", "log", "lt", "mean", "minimum", "mul", "reciprocal", "rsub", "scalar_tensor", "slice"),
    *("sqrt", "sub", "sum", "unsqueeze", "where"),
}

# More operations than these in decode, counted without those on constants, is a regression of latency.
MOST_OPERATIONS = {"ratio": 10, "threshold": 12, "top-p": 16, "layer-k": 15, "uniform-k": 15, "capped": 20}


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.rand(tokens, 4, generator=generator)
    indices = torch.randint(0, 16, (tokens, 4), generator=generator)
    return torch.randn(tokens, 8, generator=generator), indices, weights


def operations(graph: torch.fx.Graph) -> list[str]:
    """Names of the operations that depend on an input."""
    dynamic: set[torch.fx.Node] = set()
    names = []
    for node in graph.nodes:
        if node.op == "placeholder" or any(parent in dynamic for parent in node.all_input_nodes):
            dynamic.add(node)
        if node.op == "call_function":
            assert isinstance(node.target, torch._ops.OpOverload), node
            name = node.target.overloadpacket.__name__
            assert name in ALLOWED, node
            if node in dynamic:
                names.append(name)
    return names


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("fed", [False, True])
def test_trace_holds_only_portable_operations(name: str, layer: int, fed: bool) -> None:
    chosen = POLICIES[name]
    if fed and chosen.knob is None:
        return

    def run(hidden: Tensor, indices: Tensor, weights: Tensor, budget: Tensor) -> Tensor:
        return select(chosen, layer, hidden, indices, weights, budget=budget if fed else None)

    args = (*inputs(3), torch.tensor(0.9))
    graph = make_fx(run, tracing_mode="symbolic")(*args)
    graph.graph.eliminate_dead_code()
    found = operations(graph.graph)
    if not fed and layer == 0:
        assert len(found) <= MOST_OPERATIONS.get(name, 26), found
    other = (*inputs(7), torch.tensor(0.9))
    assert torch.equal(graph(*other), run(*other))


class Selects(torch.nn.Module):
    def __init__(self, chosen: Policy) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return select(self.chosen, 1, hidden, indices, weights)


@pytest.mark.parametrize("name", POLICIES)
def test_exports_with_any_number_of_tokens(name: str) -> None:
    module = Selects(POLICIES[name])
    tokens = torch.export.Dim("tokens")
    shapes = ({0: tokens}, {0: tokens}, {0: tokens})
    exported = torch.export.export(module, inputs(3), dynamic_shapes=shapes, strict=False).module()
    for count in (1, 2, 17):
        assert torch.equal(exported(*inputs(count)), module(*inputs(count)))
