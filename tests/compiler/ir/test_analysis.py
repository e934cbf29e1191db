"""Which layer a node belongs to, what it is made of, and what routes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from moec.compiler.ir.analysis import ancestors, is_mixer, layer_of, router_nodes
from moec.compiler.ir.program import EXPERTS

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.mlp.gate", 3),
        # Two attentions of one layer (LongCat-Flash) are of that layer.
        ("model.layers.2.self_attn.1.q_proj", 2),
        # Layers without attention count (LFM2).
        ("model.layers.5.conv.in_proj", 5),
        ("model.language_model.layers.12.experts", 12),
        ("transformer.blocks.0.ffn", 0),
        ("lm_head", -1),
        ("", -1),
    ],
)
def test_the_number_of_a_layer_is_that_of_the_model(module: str, layer: int) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["module"] = module
    assert layer_of(node) == layer


def layer(graph: fx.Graph, hidden: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """An experts node and its router; what the hidden states are made of is none of it."""
    gate = graph.create_node("get_attr", "gate")
    scores = graph.call_function(aten.linear.default, (hidden, gate, None))
    weights = graph.call_function(aten._softmax.default, (scores, 1, False))
    indices = graph.call_function(aten.argmax.default, (scores, 1, True))
    up, down = (graph.create_node("get_attr", name) for name in ("up", "down"))
    gated = ("silu", True, False, False, 1.0, 0.0, 0.0)
    experts = graph.call_function(EXPERTS, (hidden, indices, weights, up, None, down, None, *gated))
    return experts, [gate, scores, weights, indices]


def test_a_router_is_what_leads_to_the_routing_alone() -> None:
    graph = fx.Graph()
    hidden = graph.call_function(aten.neg.default, (graph.placeholder("x"),))
    first, router = layer(graph, hidden)
    second, further = layer(graph, graph.call_function(aten.neg.default, (first,)))
    assert router_nodes(first) == router
    assert router_nodes(second) == further


def test_a_walk_ends_where_it_is_told_to_and_comes_by_once() -> None:
    graph = fx.Graph()
    start = graph.placeholder("x")
    first, _ = layer(graph, start)
    end = graph.call_function(aten.add.Tensor, (first, first))
    assert list(ancestors([end, 3, None], is_mixer)) == [end, first]
    assert start in ancestors([end])
