"""Make a float32 Program from one that was captured in float16, so that a model is traced only once.

The opposite direction would not work: a trace in float32 lacks the casts to float32 in the model's code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.compiler.ir.fake_values import fake_mode
from moec.compiler.ir.program import Program, TensorSpec, moe_layers

_CAST = torch.ops.aten._to_copy.default


def widened(program: Program) -> Program:
    """The Program that capture in float32 would give: float16 becomes float32, and casts without effect are removed.

    Nothing has been rounded to float16 before: weights are read from the checkpoint in the dtype of the graph, and
    capture keeps its tables in float32.

    Args:
        program: The captured Program, before any pass; it is not changed.

    Returns:
        The float32 Program; `program` itself if it is in float32.
    """
    if program.dtype == torch.float32:
        return program
    graph = _widened(program.graph)
    return program.replace(
        graph=graph,
        dtype=torch.float32,
        inputs=tuple(_spec(spec) for spec in program.inputs),
        states=tuple(replace(state, input=_spec(state.input), output=_spec(state.output)) for state in program.states),
        layers=moe_layers(graph),
    )


def _widened(graph: fx.Graph) -> fx.Graph:
    mode = fake_mode(graph)
    new, mapping = fx.Graph(), dict[fx.Node, fx.Node]()

    def argument(value: Any) -> Any:
        return mapping[value] if isinstance(value, fx.Node) else _wide(value)

    for node in graph.nodes:
        args, kwargs = (fx.node.map_aggregate(part, argument) for part in (node.args, node.kwargs))
        if node.target is _CAST and args[0].meta["val"].dtype == kwargs["dtype"]:
            mapping[node] = args[0]
            continue
        mapping[node] = new.create_node(node.op, node.target, args, kwargs, node.name)
        value = fx.node.map_aggregate(node.meta.get("val"), lambda item: _value(item, mode))
        mapping[node].meta = {**node.meta, "val": value}
    return new


def _wide(value: Any) -> Any:
    return torch.float32 if value is torch.float16 else value


def _value(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float16:
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=torch.float32)


def _spec(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype=_wide(spec.dtype))
