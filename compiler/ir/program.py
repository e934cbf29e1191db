"""Program: a graph, the weights that it refers to, its states and its table of MoE layers.

The graph is a `torch.fx.Graph` of aten and moec ops. Placeholders are inputs and states; a `get_attr` node names a
tensor of the WeightStore, so a graph holds no weights. `meta["val"]` of a node is the fake value of its result, and
`meta["module"]` the path of the module that it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.indexer import INDEXER
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.ops import ATTENTION, EXPERTS, RMS_NORM, ROTARY, SELECT
from moec.compiler.ir.recurrences import CAUSAL_CONV, LINEAR_ATTENTION
from moec.compiler.ir.weights import WeightStore

__all__ = [
    "ATTENTION",
    "CACHE_KINDS",
    "CAUSAL_CONV",
    "EXPERTS",
    "INDEXER",
    "LINEAR_ATTENTION",
    "RMS_NORM",
    "ROTARY",
    "SELECT",
    "Dim",
    "MoeLayer",
    "Program",
    "Provenance",
    "StateSpec",
    "TensorSpec",
    "copy_graph",
    "module_of",
    "moe_layers",
    "state_spec",
    "weight_name",
]

Dim = int | str
"""A size: a number, or the name of a dynamic axis ("batch", "sequence", "past_sequence", "total_sequence")."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of an input or output of the Program."""

    name: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype


CACHE_KINDS = ("key", "value", "index_key")
"""Kinds of state that grow by the new tokens of a step: [B, heads, past_sequence, width]."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One state that a step reads and replaces. It starts as zeros, a KV cache with no tokens.

    Attributes:
        layer: Index of the layer.
        kind: "key" or "value"; "index_key", the keys of an indexer, which has one head (these are `CACHE_KINDS`);
            "conv", the last inputs of a short causal convolution, [B, channels, kernel size]; or "recurrent", the state
            of a scan over the tokens, [B, heads, key width, value width].
        input: Name, shape and dtype before a step.
        output: Name, shape and dtype after a step.
    """

    layer: int
    kind: str
    input: TensorSpec
    output: TensorSpec


def state_spec(layer: int, kind: str, shape: tuple[Dim, ...], dtype: torch.dtype) -> StateSpec:
    """The state of a layer, with the names of ONNX models of Hugging Face.

    Args:
        layer: Index of the layer.
        kind: See `StateSpec`.
        shape: Shape before a step.
        dtype: Dtype of input and output.
    """
    past, present = f"past_{kind}.{layer}", f"present_{kind}.{layer}"
    if kind in CACHE_KINDS:
        past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
    after: tuple[Dim, ...] = tuple("total_sequence" if size == "past_sequence" else size for size in shape)
    return StateSpec(layer, kind, TensorSpec(past, shape, dtype), TensorSpec(present, after, dtype))


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One row of the table of MoE layers.

    Attributes:
        index: Number of the MoE layer, counting only MoE layers.
        module: Path of the experts module.
        node: Name of the experts node.
        num_experts: E.
        top_k: Slots per token.
        hidden_size: H.
        intermediate_size: I, the width between the two projections.
        gate_up_proj: Name of the stacked weight, or empty if it is computed in the graph.
        down_proj: Likewise.
    """

    index: int
    module: str
    node: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gate_up_proj: str
    down_proj: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a checkpoint was read, for reports.

    Attributes:
        notes: Sentences for the user, such as which classes were used for the model type.
        left_out: Path of a part of the checkpoint that the graph does not use -> number of its tensors.
    """

    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A model between capture and lowering.

    Attributes:
        graph: The graph, as described at the top of this module.
        weights: The tensors that the graph's `get_attr` nodes name.
        inputs: The inputs except states, in placeholder order.
        states: The states, in placeholder order.
        layers: The MoE layers in execution order.
        dtype: Activation dtype.
        config: The checkpoint's config.json as a plain mapping.
        dims: Dynamic axis name -> its symbol in fake shapes.
        input_defaults: Name of an input that a pass added -> its default value.
        rotary_borders: Lengths in tokens beyond which rotary frequencies change, ascending.
        provenance: How the checkpoint was read.
        rejections: Where capture deviated from config.json.
    """

    graph: fx.Graph
    weights: WeightStore
    inputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    layers: tuple[MoeLayer, ...]
    dtype: torch.dtype
    config: Mapping[str, Any]
    dims: Mapping[str, Any]
    input_defaults: Mapping[str, Tensor] = field(default_factory=dict)
    rotary_borders: tuple[int, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)
    rejections: tuple[Rejection, ...] = ()

    def replace(self, **changes: Any) -> Program:
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)

    def copy_graph(self) -> fx.Graph:
        """Return a copy of the graph that a pass may change."""
        return copy_graph(self.graph)

    def nodes(self, target: Callable[..., Any]) -> list[fx.Node]:
        """Every call of `target`, in execution order."""
        return self.graph.find_nodes(op="call_function", target=target)

    def weight_names(self) -> tuple[str, ...]:
        """Names of the tensors that the graph refers to, each once, in the order of first use."""
        names = (str(node.target) for node in self.graph.nodes if node.op == "get_attr")
        return tuple(dict.fromkeys(names))

    @property
    def caches(self) -> tuple[StateSpec, ...]:
        """The states of the KV cache, whose axis 2 is the number of past tokens."""
        return tuple(state for state in self.states if state.kind in CACHE_KINDS)

    @property
    def replaced(self) -> tuple[StateSpec, ...]:
        """The states of fixed shape, which a step replaces as a whole."""
        return tuple(state for state in self.states if state.kind not in CACHE_KINDS)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.outputs()["logits"].meta["val"].shape[-1])

    def outputs(self) -> dict[str, fx.Node]:
        """Output name -> node: "logits", then the outputs of the states."""
        results = self.graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        names = ("logits", *(state.output.name for state in self.states))
        return {name: node for name, node in zip(names, results, strict=True) if isinstance(node, fx.Node)}


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy `graph` node by node, including metadata."""
    new, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
    return new


def module_of(node: fx.Node) -> str:
    """Path of the module that `node` came from, for messages."""
    return str(node.meta.get("module", "")) or "the model"


def weight_name(argument: object) -> str | None:
    """Name of the weight that an operand refers to, or None if it is not a weight."""
    return str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None


def moe_layers(graph: fx.Graph) -> tuple[MoeLayer, ...]:
    """The table of MoE layers, from the experts nodes of `graph`."""
    return tuple(_rows(graph))


def _rows(graph: fx.Graph) -> Iterator[MoeLayer]:
    for index, node in enumerate(graph.find_nodes(op="call_function", target=EXPERTS)):
        own = Experts.of(node)
        yield MoeLayer(
            index=index,
            module=module_of(node),
            node=node.name,
            num_experts=own.num_experts,
            top_k=own.top_k,
            hidden_size=own.hidden_size,
            intermediate_size=own.intermediate_size,
            gate_up_proj=weight_name(own.gate_up_proj) or "",
            down_proj=weight_name(own.down_proj) or "",
        )
