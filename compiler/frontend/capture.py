"""Capture: turn a checkpoint into a Program without reading a weight.

`meta_model` builds the model without weights, and torch.export traces one step with a past through the hooks of
`moec.compiler.frontend.hooks`. Prefill and decode are the same graph with another past. A first pass over fake tensors
finds the states: what attention takes as keys and values, and what a layer asks the cache of transformers to keep.

A model is traced once. `functional` turns its writes in place into new values, or torch traces the graph again where
they are not clear. Where an export in float16 needs the model in float32 too, for calibration or as the reference of
the quality gate, `moec.compiler.ir.widen` derives it from the same trace.

What cannot be captured is an UnsupportedModelError that names the module and the reason. A model is never frozen to the
experts of the sample input.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from moec.compiler.common.errors import MoecError, UnsupportedModelError, first_line
from moec.compiler.common.memory import fewer_garbage_collections
from moec.compiler.common.model_config import DEFAULT_CONTEXT, context_length
from moec.compiler.frontend import architecture
from moec.compiler.frontend.adapters.base import adapt
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.conversion import open_weights
from moec.compiler.frontend.frames import with_large_frame
from moec.compiler.frontend.functional import functional
from moec.compiler.frontend.masks import MaskUseError
from moec.compiler.frontend.meta_model import fake_parameters, meta_model
from moec.compiler.frontend.recording import Recording, recording, watching
from moec.compiler.frontend.rope import replace_length_branches
from moec.compiler.frontend.scans import scans_as_ops
from moec.compiler.frontend.step_cache import CacheUseError, cache_class, check_convolutions, step_cache
from moec.compiler.ir.program import (
    CACHE_KINDS,
    Dim,
    Program,
    Provenance,
    StateSpec,
    TensorSpec,
    moe_layers,
    state_spec,
)
from moec.compiler.ir.weights import Constant, LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = ("input_ids", "attention_mask", "position_ids", "cache_position")
AXES = ("batch", "sequence", "past_sequence", "total_sequence")
# All sizes differ, so that torch.export does not take two axes for one.
SAMPLE = {"batch": 2, "sequence": 5, "past_sequence": 7, "total_sequence": 12}


_ONE_AT_A_TIME = threading.Lock()
"""Only one thread traces at a time, since the tracing modes of torch belong to the process."""


@with_large_frame
def capture(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> Program:
    """Trace one step of the model: prefill and decode are the same graph with another past.

    Args:
        checkpoint: The checkpoint; its weights are not read.
        dtype: Activation dtype of the graph.

    Returns:
        A Program with dynamic batch, sequence and past; inputs `input_ids`, `attention_mask` [B, P + S],
        `position_ids` and `cache_position` [S], outputs `logits` and the present states.

    Raises:
        UnsupportedModelError: Something cannot be captured; the message names the module and the reason.
        CheckpointError: Config and weights disagree.
    """
    with _ONE_AT_A_TIME:
        return _capture(checkpoint, dtype)


def _capture(checkpoint: Checkpoint, dtype: torch.dtype) -> Program:
    model, tables = meta_model(checkpoint, dtype)
    opened = open_weights(checkpoint, model)
    names = {module: name for name, module in model.named_modules()}
    decoder = architecture.text_decoder(model)
    max_length = context_length(decoder.config.get_text_config().to_dict()) or DEFAULT_CONTEXT
    adapt(model)
    borders = replace_length_branches(model)
    with torch.no_grad(), fewer_garbage_collections():
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        fake_parameters(model, mode)
        states = _states(decoder, names, max_length, mode, dtype)
        step = _Step(model, decoder, names, max_length, states)
        exported, traced = _export(step, states, mode)
    graph, constants, dims = _own_graph(exported, traced, states, tables)
    inputs = tuple(TensorSpec(name, _INPUT_SHAPES[name], torch.int64) for name in INPUTS)
    layers = moe_layers(graph)
    _check_layers(model, layers, step.traced.record)
    store = opened.store.with_tensors(constants)
    program = Program(graph, store, inputs, states, layers, dtype, checkpoint.raw_config, dims)
    return program.replace(
        rotary_borders=tuple(sorted(borders)),
        provenance=Provenance(checkpoint.notes, opened.left_out(program.weight_names())),
        rejections=opened.rejections,
    )


_INPUT_SHAPES: dict[str, tuple[Dim, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total_sequence"),
    "position_ids": ("batch", "sequence"),
    "cache_position": ("sequence",),
}


def _states(
    model: PreTrainedModel, names: dict[nn.Module, str], max_length: int, mode: FakeTensorMode, dtype: torch.dtype
) -> tuple[StateSpec, ...]:
    """The state table, found by one forward pass over fake tensors.

    Raises:
        UnsupportedModelError: The model has no experts or no attention, or one of its modules cannot be traced.
    """
    record = Recording(max_length, names)
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    with mode, recording(record), watching(record, model), scans_as_ops(model):
        ids = torch.zeros(1, 3, dtype=torch.long)
        _call(model, ids, torch.ones(1, 3, dtype=torch.long), torch.arange(3)[None], record, layers, 0)
    check_convolutions(model, record)
    if not record.experts:
        _reject_without_experts(model, record)
    if not record.attentions:
        raise UnsupportedModelError(f"{type(model).__name__}: no layer attends to earlier tokens")
    return tuple(
        state_spec(layer, kind, shape, dtype if kind in CACHE_KINDS else own)
        for (layer, kind), (shape, own) in sorted(record.states.items())
    )


def _reject_without_experts(model: nn.Module, record: Recording) -> None:
    named = [
        name
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() or "moe" in type(module).__name__.lower().rsplit("for", 1)[0]
        if not isinstance(module, nn.ModuleList) and name.count(".") > 1
    ]
    # "moe" may be part of the model's name and so of every class name; stacked weights tell experts from other modules.
    stacked = [name for name in named if any(p.ndim == 3 for p in model.get_submodule(name).parameters(recurse=False))]
    suspects = stacked or named
    if suspects:
        kind = type(dict(model.named_modules())[suspects[0]]).__name__
        raise UnsupportedModelError(
            f"{suspects[0]}: {kind} bypasses the experts registry of transformers and has no adapter",
            hint="moec families lists what works; CONTRIBUTING.md says how to write an adapter",
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} is a dense model: none of its {len(record.attentions)} layers has experts",
        hint="moec compiles mixture-of-experts models; for dense models use optimum or the exporters of transformers",
    )


def _call(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    record: Recording,
    layers: int,
    length: Any,
) -> Any:
    """Run one step, and turn an exception of the model into an UnsupportedModelError that names the module."""
    try:
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            return_dict=True,
            **{architecture.cache_argument(model): step_cache(record, layers, length, cache_class(model))},
        )
    except MoecError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{record.where()} of {type(model).__name__} cannot be traced: {_reason(error)}",
            hint="moec families lists what works and why the rest does not",
        ) from error


def _reason(error: Exception) -> str:
    """What went wrong in a module, for readers who know the model and not the tracer."""
    if isinstance(error, MaskUseError | CacheUseError):
        return str(error)
    if isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException):
        return "its Python code branches on the values of a tensor, which differ from input to input"
    return f"{type(error).__name__}: {first_line(error)}"


class _LastRecording:
    record: Recording | None = None


class _Step(nn.Module):
    """The function that is exported: flat inputs and states in, logits and present states out."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        names: dict[nn.Module, str],
        max_length: int,
        states: Sequence[StateSpec],
    ) -> None:
        super().__init__()
        self.model, self.names, self.max_length = model, names, max_length
        self.decoder = [decoder]  # in a list, so that its parameters keep their names in the whole model
        self.states = [(state.layer, state.kind) for state in states]
        # torch.export restores the attributes that a trace assigns, so the recording is kept in another object.
        self.traced = _LastRecording()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache_position: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        by_state = dict(zip(self.states, past, strict=True))
        record = Recording(self.max_length, self.names, cache_position, attention_mask, by_state)
        self.traced.record = record
        layers = max(layer for layer, _ in self.states) + 1
        length = next(state.shape[2] for (_, kind), state in by_state.items() if kind in CACHE_KINDS)
        (decoder,) = self.decoder
        layers = max(layers, int(decoder.config.get_text_config().num_hidden_layers))
        with recording(record), watching(record, decoder), scans_as_ops(decoder):
            out = _call(decoder, input_ids, attention_mask, position_ids, record, layers, length)
        return out.logits, [record.present[state] for state in self.states]


def _export(
    step: _Step, states: Sequence[StateSpec], mode: FakeTensorMode
) -> tuple[torch.export.ExportedProgram, fx.Graph]:
    """Trace a step; return the program of torch.export, and its graph without writes in place."""
    batch, sequence, _, total = (SAMPLE[axis] for axis in AXES)
    auto = torch.export.Dim.DYNAMIC
    with mode:
        # Every argument is an object of its own: torch.export silently merges a tensor that is given twice.
        args = (
            torch.zeros(batch, sequence, dtype=torch.long),
            torch.ones(batch, total, dtype=torch.long),
            torch.zeros(batch, sequence, dtype=torch.long),
            torch.zeros(sequence, dtype=torch.long),
            [
                torch.zeros(
                    [SAMPLE[size] if isinstance(size, str) else size for size in state.input.shape],
                    dtype=state.input.dtype,
                )
                for state in states
            ],
        )
    token = {0: auto, 1: auto}
    past = [{axis: auto for axis, size in enumerate(state.input.shape) if isinstance(size, str)} for state in states]
    dynamic = (token, dict(token), dict(token), {0: auto}, past)
    try:
        exported = torch.export.export(step, args, dynamic_shapes=dynamic, strict=False)
        graph = functional(exported.graph)
        if graph is None:
            exported = exported.run_decompositions({})
            graph = exported.graph
    except MoecError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(step.model).__name__} cannot be exported: {_reason(error)}",
            hint="data-dependent Python in a module stops the trace; moec families lists what works",
        ) from error
    return exported, graph


def _own_graph(
    exported: torch.export.ExportedProgram, traced: fx.Graph, states: Sequence[StateSpec], tables: Mapping[str, Tensor]
) -> tuple[fx.Graph, dict[str, LazyTensor], dict[str, Any]]:
    """Copy the trace into a graph whose parameters are `get_attr` nodes and whose inputs have moec's names.

    Args:
        exported: The exported program.
        traced: Its graph without writes in place.
        states: The state table.
        tables: Buffer name -> its value before it was rounded.

    Returns:
        The graph, the constants that it names, and dynamic axis -> its symbol.
    """
    prefix = "model."
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    constants: dict[str, LazyTensor] = {}
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    users: list[fx.Node] = []
    for node in traced.nodes:
        spec = kinds.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            name = str(spec.target).removeprefix(prefix)
            value = _constant(exported, str(spec.target))
            if value is not None:
                constants[name] = Constant(tables.get(name, value))
            mapping[node] = graph.create_node("get_attr", name)
        elif node.op == "output":
            results = node.args[0]
            graph.output(tuple(mapping[item] for item in results))
            continue
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = {"val": node.meta.get("val"), "module": _module_path(node, prefix)}
        if node.op == "placeholder" and mapping[node].op == "placeholder":
            users.append(mapping[node])
    dims = _name_inputs(users, states)
    # The trace has inputs for parameters that no step uses, such as those of a vision tower.
    graph.eliminate_dead_code()
    return graph, constants, dims


def _constant(exported: torch.export.ExportedProgram, target: str) -> Tensor | None:
    value = exported.constants.get(target, exported.state_dict.get(target))
    return value.detach() if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else None


def _module_path(node: fx.Node, prefix: str) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    # Nodes that passes of torch.export made have a placeholder entry (torch/_export/passes/_node_metadata_hook.py).
    path = [str(entry[0]) for key, entry in stack.items() if not key.startswith("_empty_nn_module_stack")]
    return path[-1].removeprefix("L['self'].").removeprefix(prefix) if path else ""


def _name_inputs(users: Sequence[fx.Node], states: Sequence[StateSpec]) -> dict[str, Any]:
    """Give the placeholders the names of moec's inputs and states, and return dynamic axis -> its symbol."""
    dims: dict[str, Any] = {}
    for name, node in zip(INPUTS, users, strict=False):
        node.target = node.name = name
        for axis, size in zip(_INPUT_SHAPES[name], node.meta["val"].shape, strict=True):
            dims.setdefault(str(axis), size)
    for state, node in zip(states, users[len(INPUTS) :], strict=True):
        node.target = node.name = f"past_{state.layer}_{state.kind}"
        for axis, size in zip(state.input.shape, node.meta["val"].shape, strict=True):
            if isinstance(axis, str):
                dims.setdefault(axis, size)
    return dims


def _check_layers(model: nn.Module, layers: Sequence[Any], record: Recording | None) -> None:
    """Check that every call of experts is a node of the graph, and none was folded to the experts of the sample.

    Raises:
        UnsupportedModelError: The counts differ.
    """
    assert record is not None
    if len(layers) != len(record.experts):
        raise UnsupportedModelError(
            f"{type(model).__name__}: {len(record.experts)} experts modules ran but {len(layers)} are in the graph",
            hint="please report this model",
        )
