"""Graph analysis: the ancestors of nodes, the router of an experts node, and the layer of a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.indexer import INDEXER
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.ops import ATTENTION, EXPERTS
from moec.compiler.ir.program import module_of
from moec.compiler.ir.recurrences import CAUSAL_CONV, LINEAR_ATTENTION

TOKEN_MIXERS = frozenset({ATTENTION, INDEXER, LINEAR_ATTENTION, CAUSAL_CONV})
"""Ops that mix tokens."""
MIXERS = TOKEN_MIXERS | {EXPERTS}
"""Ops at which a walk from a router back through the graph stops, since they belong to an earlier block."""


def ancestors(start: Iterable[Any], stop: Callable[[fx.Node], bool] = lambda _: False) -> dict[fx.Node, None]:
    """The nodes of `start` and their ancestors, nearest first.

    Args:
        start: Nodes; items of other types are skipped.
        stop: If it holds for a node, the node is in the result, but the walk does not go on to its inputs.
    """
    waiting = [node for node in start if isinstance(node, fx.Node)]
    found: dict[fx.Node, None] = {}
    for node in waiting:  # grows while it is walked
        if node not in found:
            found[node] = None
            if not stop(node):
                waiting.extend(node.all_input_nodes)
    return found


def is_mixer(node: fx.Node) -> bool:
    """Whether `node` mixes tokens or is an experts node."""
    return node.target in MIXERS


def router_nodes(experts: fx.Node) -> list[fx.Node]:
    """The router of an experts node, in the order of the graph.

    These are the ancestors of its indices and weights that are not ancestors of its hidden states, up to the previous
    token mixer or experts node.
    """
    operands = Experts.of(experts)
    before = ancestors([operands.hidden_states], is_mixer)
    wanted = ancestors([operands.indices, operands.weights], lambda node: node in before or is_mixer(node))
    return [node for node in experts.graph.nodes if node in wanted and node not in before]


def lookup_tables(graph: fx.Graph) -> list[str]:
    """Names of the weights whose rows are looked up by index: embeddings."""
    tables = (node.args[0] for node in graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default))
    return [str(table.target) for table in tables if isinstance(table, fx.Node) and table.op == "get_attr"]


def layer_of(node: fx.Node) -> int:
    """Number of the layer of `node`, from the path of its module; -1 outside of the layers.

    `model.layers.3.self_attn.0` belongs to layer 3. Names of states, overrides of a quantization plan and reports use
    the same number.
    """
    return next((int(part) for part in module_of(node).split(".") if part.isdecimal()), -1)
