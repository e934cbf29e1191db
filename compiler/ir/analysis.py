"""Graph analysis: the ancestors of nodes, the router of an experts node, the layer of a node, and what slots decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.indexer import INDEXER
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.ops import ATTENTION, EXPERTS
from moec.compiler.ir.program import Program, module_of
from moec.compiler.ir.recurrences import CAUSAL_CONV, LINEAR_ATTENTION
from moec.compiler.ir.stages import NUMBERS

TOKEN_MIXERS = frozenset({ATTENTION, INDEXER, LINEAR_ATTENTION, CAUSAL_CONV})
"""Ops that mix tokens."""
_READERS_OF_SLOTS = frozenset({ATTENTION, INDEXER, torch.ops.aten.sym_size.int})
"""Ops that may get the slots of the new tokens: padding changes nothing in what they compute."""
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


def max_shared_length(program: Program) -> int | None:
    """Length in tokens up to which a sequence in a batch with left padding computes what it computes alone.

    Beyond the first length at which rotary frequencies change, the longest sequence decides on those of all. In a model
    that computes with the number of slots before a token, as the attention temperature of Llama 4 does, padding counts
    from the start.

    Args:
        program: A Program at CORE.

    Returns:
        The length, 0 if padding always counts, and None if it never does.
    """
    placeholders = program.graph.find_nodes(op="placeholder")
    slots = [node for node, spec in zip(placeholders, program.inputs, strict=False) if spec.name == "cache_position"]
    if any(user.target not in _READERS_OF_SLOTS for node in slots for user in node.users):
        return 0
    past = str(program.dims.get("past_sequence"))
    if any(past in _symbols(number) for node in program.graph.nodes for number in _numbers(node)):
        return 0
    return min(program.rotary_borders, default=None)


def _numbers(node: fx.Node) -> Iterable[Any]:
    """The arguments of a node that are numbers to compute with, and not sizes."""
    if node.target is torch.ops.aten.full.default:
        return node.args[1:2]
    return node.args if node.target in NUMBERS or node.target is torch.ops.aten.arange.start_step else ()


def _symbols(argument: Any) -> set[str]:
    """The dynamic axes that a size is computed from."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return {str(symbol) for symbol in value.node.expr.free_symbols} if isinstance(value, torch.SymInt) else set()
