"""Replaces positions that a model derives from the length of its past by the input `cache_position`.

In this target the cache has a fixed capacity, so its length is not the number of past tokens. Llama 4, for example,
scales its attention by `arange(S) + past`, which is what `cache_position` holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moec.compiler.ir.program import Program, moe_layers
from moec.targets.common.refusals import refuse

aten = torch.ops.aten


def use_cache_position(program: Program) -> Program:
    """Replace `arange(sequence) + past` by `cache_position`.

    Raises:
        LoweringError: An op other than attention depends on the length of the past in another way.
    """
    graph = program.copy_graph()
    position = next(node for node in graph.find_nodes(op="placeholder") if node.target == "cache_position")
    for node in list(graph.nodes):
        if node.target is aten.add.Tensor and _counts_from_past(program, node):
            node.replace_all_uses_with(position)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt) and _depends_on_past(program, node):
            user = next(iter(node.users))
            raise refuse(
                user,
                "it depends on the length of the past, which is not known in a KV cache of fixed capacity",
                hint="use --target onnx, whose KV cache grows",
            )
    return program.replace(graph=graph, layers=moe_layers(graph))


def _counts_from_past(program: Program, node: fx.Node) -> bool:
    sequence, past = str(program.dims.get("sequence")), str(program.dims.get("past_sequence"))
    return any(
        _is_arange(line, sequence) and isinstance(offset, fx.Node) and str(offset.meta.get("val")) == past
        for line, offset in (node.args, node.args[::-1])
    )


def _is_arange(argument: Any, sequence: str) -> bool:
    """Whether `argument` is 0, 1, ..., S - 1."""
    return (
        isinstance(argument, fx.Node)
        and argument.target is aten.arange.start_step
        and (argument.args[0], argument.args[2]) == (0, 1)
        and argument.meta["val"].dtype is torch.int64
        and str(argument.meta["val"].shape[0]) == sequence
    )


def _depends_on_past(program: Program, node: fx.Node) -> bool:
    symbols = {str(program.dims.get(axis)) for axis in ("past_sequence", "total_sequence")}
    free = {str(symbol) for symbol in node.meta["val"].node.expr.free_symbols}
    # In some graphs the total length is the sum of past and new tokens, in others it is a separate symbol.
    return bool(free & symbols - {str(program.dims.get("sequence"))})
