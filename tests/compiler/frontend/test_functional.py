"""Writes of a trace become new values where it is clear what is written; what is not clear is left to torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from moec.compiler.frontend.functional import functional

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]


class _Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def sample(batch: int) -> Tensor:
    return torch.randn(batch, 4, 6, generator=torch.Generator().manual_seed(batch))


def traced(function: Function) -> fx.Graph:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        return torch.export.export(_Module(function), (sample(3),), dynamic_shapes=dynamic, strict=False).graph


def divided(x: Tensor) -> Tensor:
    weights = x.softmax(-1)
    weights /= weights.sum(-1, keepdim=True)
    return weights


def chained(x: Tensor) -> Tensor:
    y = x + 1
    before = y * 2
    y.mul_(3).add_(x)
    y -= 1
    return before + y


def filled(x: Tensor) -> Tensor:
    whole = x.new_empty(x.shape[0], 4, 8)
    whole[..., :2] = x[..., :2].exp()
    whole[..., 2:] = x
    return whole * whole.transpose(0, 0)


def row_of(x: Tensor) -> Tensor:
    y = x.clone()
    row = y.select(1, 1)
    row *= 2
    row += 1
    return y + row[:, None]


def masked(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x)
    mask.scatter_(2, x.topk(2).indices, 1)
    return x.masked_fill(mask == 0, 0.0)


def copies(x: Tensor) -> Tensor:
    y = nn.functional.dropout(x.contiguous().float(), 0.5, training=False).to("cpu", torch.float32)
    first, second = y.flatten(1).chunk(2, 1)
    whole = torch.cat([y.flatten(0, 1), y.flatten().reshape(-1, 6).double().to(x)])
    return whole[: x.shape[0] * 4].view_as(x) * (first * second).sum()


def in_uneven_pieces(x: Tensor) -> Tensor:
    pieces = x.chunk(4, -1)  # 6 in three pieces of 2
    longer, shorter = x.transpose(1, 2).flatten(1)[:, :21].chunk(2, 1)  # 11 and 10
    return pieces[0] * pieces[-1] + longer.sum() - 2 * shorter.sum()


CLEAR = (divided, chained, filled, row_of, masked, copies, in_uneven_pieces)


@pytest.mark.parametrize("function", CLEAR)
def test_what_is_written_becomes_a_value(function: Function) -> None:
    graph = traced(function)
    before = str(graph)
    result = functional(graph)
    assert result is not None
    assert str(graph) == before
    for node in result.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node
            assert str(node.target).split(".")[1] not in ("to", "chunk", "flatten", "contiguous", "view_as"), node
    for batch in (3, 5):
        (got,) = fx.Interpreter(fx.GraphModule(nn.Module(), result)).run(sample(batch))
        torch.testing.assert_close(got, function(sample(batch)), rtol=0, atol=0)


def test_the_value_of_a_write_has_the_shape_and_module_of_the_write() -> None:
    graph = traced(divided)
    result = functional(graph)
    assert result is not None
    (write,) = graph.find_nodes(op="call_function", target=aten.div_.Tensor)
    (value,) = result.find_nodes(op="call_function", target=aten.div.Tensor)
    assert value.meta["val"].shape == write.meta["val"].shape
    assert value.meta["nn_module_stack"] == write.meta["nn_module_stack"]


def written_twice(x: Tensor) -> Tensor:
    y = (x + 1).float()
    y *= 2
    y += x
    return y


@pytest.mark.parametrize("name", ["add", "to", "mul_", "add_"])
def test_a_tensor_has_one_value_under_all_its_names(name: str) -> None:
    graph = traced(written_twice)
    graph.output_node().args = (tuple(node for node in graph.nodes if node.name == name),)
    result = functional(graph)
    assert result is not None
    (got,) = fx.Interpreter(fx.GraphModule(nn.Module(), result)).run(sample(3))
    torch.testing.assert_close(got, written_twice(sample(3)), rtol=0, atol=0)


def to_an_input(x: Tensor) -> Tensor:
    x += 1
    return x * 2


def seen_by_an_older_view(x: Tensor) -> Tensor:
    y = x + 1
    flat = y.view(-1, 6)
    y *= 2
    return y.view(-1, 6) + flat


def seen_by_another_slice(x: Tensor) -> Tensor:
    y = x + 1
    row, same = y.select(1, 1), y.select(1, -3)
    row *= 2
    return y + same[:, None]


def through_two_views(x: Tensor) -> Tensor:
    y = x + 1
    y.select(1, 1).select(1, 2).mul_(2)
    return y


def into_what_may_be_a_copy(x: Tensor) -> Tensor:
    y = x + 1
    y.transpose(1, 2).contiguous().mul_(2)
    return y


def of_a_wider_dtype(x: Tensor) -> Tensor:
    y = x.half()
    y *= x
    return y


def by_a_composite_op(x: Tensor) -> Tensor:
    return x.swapaxes(1, 2) + 1


def by_chance(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5, training=True)


UNCLEAR = (
    by_chance,
    to_an_input,
    seen_by_an_older_view,
    seen_by_another_slice,
    through_two_views,
    into_what_may_be_a_copy,
    of_a_wider_dtype,
    by_a_composite_op,
)


@pytest.mark.parametrize("function", UNCLEAR)
def test_what_is_not_clear_is_left_to_torch(function: Function) -> None:
    assert functional(traced(function)) is None
