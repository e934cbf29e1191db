"""What a graph says of itself: what a node is made of, which nodes route, and which layer a node belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from moec.compiler.ir.indexer import INDEXER
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.ops import ATTENTION, EXPERTS
from moec.compiler.ir.program import module_of
from moec.compiler.ir.recurrences import CAUSAL_CONV, LINEAR_ATTENTION

TOKEN_MIXERS = frozenset({ATTENTION, INDEXER, LINEAR_ATTENTION, CAUSAL_CONV})
"""Ops through which tokens see each other."""
MIXERS = TOKEN_MIXERS | {EXPERTS}
"""Ops that end a layer's router, and a walk from a later layer to an earlier one."""


def ancestors(start: Iterable[Any], stop: Callable[[fx.Node], bool] = lambda _: False) -> dict[fx.Node, None]:
    """The nodes of `start` and all that they are made of, nearest first.

    Args:
        start: Nodes; whatever else is among them is skipped.
        stop: A node for which it holds is among the result, and what it is made of is not.
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
    """Whether `node` lets tokens see each other, or is an experts node."""
    return node.target in MIXERS


def router_nodes(experts: fx.Node) -> list[fx.Node]:
    """The router of an experts node, in the order of the graph.

    It is whatever the indices and weights are made of and the hidden states of the layer are not, up to the mixer of
    tokens or the experts before.
    """
    operands = Experts.of(experts)
    before = ancestors([operands.hidden_states], is_mixer)
    wanted = ancestors([operands.indices, operands.weights], lambda node: node in before or is_mixer(node))
    return [node for node in experts.graph.nodes if node in wanted and node not in before]


def layer_of(node: fx.Node) -> int:
    """Number of the model's layer that `node` belongs to, as the path of its module has it; -1 outside of all.

    `model.layers.3.self_attn.0` belongs to layer 3. The same number stands in the names of states, in the overrides of
    a quantization plan and in the report.
    """
    return next((int(part) for part in module_of(node).split(".") if part.isdecimal()), -1)
