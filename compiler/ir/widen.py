"""A Program in float32 from one that was captured in float16, so that a model is traced once.

A trace in float16 is the one to start from: it has the casts to float32 that the code of the model asks for, which a
trace in float32 lacks, since they do nothing there.
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
    """What capture in float32 gives: all that is float16 in `program` is float32, and casts that do nothing are gone.

    Weights are read from the checkpoint in the dtype that the graph asks for, and tables that capture made are kept in
    float32: nothing has been rounded to float16.

    Args:
        program: As captured, before any pass; it stays as it is.

    Returns:
        The Program; `program` itself if it is in float32.
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
