"""Lower a Program to an ONNX model: walk the graph, call the table, write the files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.common.errors import LoweringError
from moec.compiler.common.progress import in_megabytes
from moec.compiler.ir.analysis import max_shared_length
from moec.compiler.ir.operands import Attention
from moec.compiler.ir.program import ATTENTION, EXPERTS, Program, TensorSpec, module_of
from moec.compiler.ir.weights import LazyTensor
from moec.targets.common.table import lookup
from moec.targets.onnx.context import AXIS_NAMES, CUT_SEQUENCE, DTYPES, MS, Context, Dialect
from moec.targets.onnx.experts import LAYERS
from moec.targets.onnx.files import data_name
from moec.targets.onnx.lowerings import last_logits
from moec.targets.onnx.lowerings.group_query import share_lengths
from moec.targets.onnx.lowerings.linear import untransposed_weights
from moec.targets.onnx.lowerings.quantized import Packed
from moec.targets.onnx.runner import MAX_SHARED_LENGTH, NUM_LOGITS, ROUTING_OUTPUTS, routing_outputs
from moec.targets.onnx.stored import TABLE

IR_VERSION = 11
SYNTHESISED = ("cache_position",)
"""Inputs of the Program that the ONNX model computes itself, from the lengths of its other inputs."""


def build(program: Program, dialect: Dialect, *, routing: bool = False) -> tuple[ir.Model, Context]:
    """Lower `program`.

    Args:
        program: The Program to lower, with dynamic batch, sequence and past.
        dialect: Which ONNX operators may be written.
        routing: Whether the model also returns the experts of each token (`routing_outputs`).

    Returns:
        The model, whose large initializers have no values yet, and the context, which holds these lazily.

    Raises:
        LoweringError: An op is not supported.
    """
    ctx = Context(program, dialect, untransposed_weights(program.graph, program.weights.resolve))
    inputs = _inputs(ctx)
    head = last_logits.head_of(program) if dialect.input_defaults else ()
    for node in program.graph.nodes:
        if node.op == "call_function":
            ctx.module = module_of(node)
            if node in head[:1]:
                inputs.insert(len(inputs) - len(program.states), last_logits.keep_last(ctx, head))
            if node.target is EXPERTS:
                ctx.begin_layer(node)
            ctx.set(node, lookup(dialect.table, node, dialect.target)(ctx, node))
            if node.target is EXPERTS:
                ctx.layers[-1]["output"] = (ctx.get(node), node.meta["val"].dtype)
    outputs = _outputs(ctx)
    if routing:
        outputs += _routing_outputs(ctx)
    _drop_unused(ctx.nodes, outputs)
    initializers = [value for value, _ in ctx.initializers.values()] + ctx.constants()
    initializers += [value for value in inputs if value.const_value is not None]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=ctx.nodes,
        initializers=initializers,
        opset_imports={"": dialect.opset, MS: 1} if dialect.contrib else {"": dialect.opset},
        name="moec",
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="moec")
    model.metadata_props["moec.attention"] = "GroupQueryAttention" if dialect.shared_buffer else "Attention"
    if routing:
        sizes = {str(layer.index): layer.num_experts for layer in program.layers}
        model.metadata_props[ROUTING_OUTPUTS] = json.dumps(sizes, sort_keys=True)
    if (shared := max_shared_length(program)) is not None:
        model.metadata_props[MAX_SHARED_LENGTH] = str(shared)
    model.metadata_props[TABLE] = json.dumps({**ctx.others, **ctx.experts}, sort_keys=True)
    layers = [
        {role: [value.name, int(DTYPES[dtype])] for role, (value, dtype) in entry.items()} for entry in ctx.layers
    ]
    model.metadata_props[LAYERS] = json.dumps(layers, sort_keys=True)
    return model, ctx


def _spec_value(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, type=ir.TensorType(DTYPES[spec.dtype]), shape=ir.Shape(_axes(spec)))


def _axes(spec: TensorSpec) -> list[int | str]:
    """The shape of `spec`, with dynamic axes named as in the file."""
    return [AXIS_NAMES.get(size, size) if isinstance(size, str) else size for size in spec.shape]


def _own_axes(spec: TensorSpec) -> list[int | str]:
    """As `_axes`, with names that no other value has: a default may have length 1 where other values have the tokens.

    ONNX Runtime takes axes of one name as equally long, and lets values of one shape use one buffer.
    """
    return [f"{spec.name}_{size}" if isinstance(size, str) else size for size in _axes(spec)]


def _inputs(ctx: Context) -> list[ir.Value]:
    specs = [*ctx.program.inputs, *(state.input for state in ctx.program.states)]
    inputs: list[ir.Value] = []
    defaults = ctx.program.input_defaults
    placeholders = ctx.program.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, specs, strict=True):
        if spec.name not in SYNTHESISED:
            inputs.append(_spec_value(spec))
            ctx.set(node, inputs[-1])
            inputs[-1].shape = ir.Shape(_axes(spec))  # a cache may be wider than that of the trace
            if spec.name in defaults and ctx.dialect.input_defaults:
                # An initializer of the same name as an input is the default value of that input.
                inputs[-1].const_value = ir.Tensor(defaults[spec.name].numpy(), name=spec.name)
                inputs[-1].shape = ir.Shape(_own_axes(spec))
    if ctx.dialect.shared_buffer:
        share_lengths(ctx)
    for node, spec in zip(placeholders, specs, strict=True):
        if spec.name == "cache_position" and node.users:
            ctx.set(node, _cache_position(ctx, placeholders))
    return inputs


def _cache_position(ctx: Context, placeholders: list[fx.Node]) -> ir.Value:
    """Slots of the new tokens in the cache, [S]: P, P + 1, ..., P + S - 1 for a past of P tokens."""
    past = ctx.axis_length(Attention.of(ctx.program.nodes(ATTENTION)[0]).past_key, 2)
    total = ctx.op("Add", past, ctx.axis_length(placeholders[0], 1))
    return ctx.op("Range", past, total, ctx.constant(np.int64(1)))


def _drop_unused(nodes: list[ir.Node], outputs: list[ir.Value]) -> None:
    """Remove nodes whose outputs are unused: some lowerings emit values that their users turn out not to need."""
    wanted = set(outputs)
    for node in reversed(list(nodes)):
        if not any(value in wanted or value.uses() for value in node.outputs):
            for position in range(len(node.inputs)):
                node.replace_input_with(position, None)
            nodes.remove(node)


def _outputs(ctx: Context) -> list[ir.Value]:
    """Name the outputs. Logits are cast to float32, whatever dtype the graph computes in."""
    program = ctx.program
    outputs: list[ir.Value] = []
    specs = {state.output.name: state.output for state in program.states}
    for name, node in program.outputs().items():
        fake = node.meta["val"]
        dtype = torch.float32 if name == "logits" else fake.dtype
        value = ctx.op("Cast", ctx.get(node), to=int(DTYPES[dtype])) if dtype != fake.dtype else ctx.get(node)
        if value.name in {output.name for output in outputs} or value.producer() is None:
            value = ctx.op("Identity", value)
        value.type = ir.TensorType(DTYPES[dtype])
        value.shape = ir.Shape(_axes(specs[name])) if name in specs else ctx.traced_shape(node)
        value.name = name
        outputs.append(value)
    return outputs


def _routing_outputs(ctx: Context) -> list[ir.Value]:
    """The experts of each token and their weights, of every MoE layer."""
    outputs = []
    for layer, entry in zip(ctx.program.layers, ctx.layers, strict=True):
        kinds = (("indices", ir.DataType.INT64), ("weights", ir.DataType.FLOAT))
        for name, (role, dtype) in zip(routing_outputs(layer.index), kinds, strict=True):
            value = ctx.op("Cast", entry[role][0], to=int(dtype))
            value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(["tokens", layer.top_k])
            outputs.append(value)
    return outputs


def signature(program: Program, *, routing: bool = False, defaults: bool = True) -> Mapping[str, Any]:
    """Inputs, outputs and states for moec.json; `routing` as for `build`, `defaults` as `Dialect.input_defaults`."""

    def row(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "shape": _axes(spec), "dtype": str(spec.dtype).removeprefix("torch.")}

    inputs = [row(spec) for spec in program.inputs if spec.name not in SYNTHESISED]
    tokens = "sequence"
    if defaults and last_logits.head_of(program):
        inputs.append({"name": NUM_LOGITS, "shape": [], "dtype": "int64"})
        tokens = CUT_SEQUENCE
    logits = program.outputs()["logits"].meta["val"]
    returned = [TensorSpec("logits", ("batch", tokens, int(logits.shape[-1])), torch.float32)]
    for layer in program.layers if routing else ():
        indices, weights = routing_outputs(layer.index)
        returned.append(TensorSpec(indices, ("tokens", layer.top_k), torch.int64))
        returned.append(TensorSpec(weights, ("tokens", layer.top_k), torch.float32))
    return {
        "inputs": inputs,
        "outputs": [row(spec) for spec in returned],
        "states": [
            {"layer": state.layer, "kind": state.kind, "input": row(state.input), "output": row(state.output)}
            for state in program.states
        ],
    }


LARGE, PAGE, LINE = 1 << 16, 4096, 64
"""Tensors of `LARGE` bytes or more are aligned to a page, so that they can be memory-mapped; others to a cache line."""


def write(model: ir.Model, ctx: Context, path: Path, progress: Any, *, limit: int | None = None) -> tuple[str, ...]:
    """Write the graph to `path`, and its data to files beside it, with one slice of one tensor in memory at a time.

    The bytes are the same on every run: tensors are stored in the order of first use, with zeros as padding.

    Args:
        model: The model.
        ctx: Its lowering, with the tensors.
        path: File of the graph, in an existing directory.
        progress: Told of the bytes that were written.
        limit: Largest size of a data file in bytes; None: there is one data file of any size.

    Returns:
        Names of the data files.

    Raises:
        LoweringError: A single tensor is larger than `limit`.
    """
    sizes = {_identity(name, tensor): tensor.nbytes for name, (_, tensor) in ctx.initializers.items()}
    total, done, told = sum(sizes.values()), 0, in_megabytes(progress, "weights")
    offsets: dict[str, tuple[str, int]] = {}
    names = [data_name(path.name, 0)]
    with contextlib.ExitStack() as opened:
        file = opened.enter_context((path.parent / names[-1]).open("wb"))
        for name, (value, tensor) in ctx.initializers.items():
            identity = _identity(name, tensor)
            if identity not in offsets:
                padding = -file.tell() % (PAGE if tensor.nbytes >= LARGE else LINE)
                if limit is not None and file.tell() + padding + tensor.nbytes > limit:
                    _check_size(name, tensor, limit)
                    names.append(data_name(path.name, len(names)))
                    file, padding = opened.enter_context((path.parent / names[-1]).open("wb")), 0
                file.write(b"\0" * padding)
                offsets[identity] = names[-1], file.tell()
                for chunk in tensor.chunks():
                    file.write(_bytes(chunk).data)
                    done += chunk.numel() * chunk.element_size()
                    told(done, total)
            value.const_value = _stored(path, name, value, offsets[identity], tensor.nbytes)
    ir.save(model, path)
    return tuple(names)


def _stored(path: Path, name: str, value: ir.Value, place: tuple[str, int], size: int) -> ir.ExternalTensor:
    """The tensor `name` at a data file and an offset in it."""
    file, offset = place
    assert value.dtype is not None
    assert isinstance(value.shape, ir.Shape)
    return ir.ExternalTensor(file, offset, size, value.dtype, shape=value.shape, name=name, base_dir=path.parent)


def _check_size(name: str, tensor: LazyTensor, limit: int) -> None:
    """Check that a tensor fits into a data file.

    Raises:
        LoweringError: It does not.
    """
    if tensor.nbytes > limit:
        raise LoweringError(
            f"{name} has {tensor.nbytes} bytes, and a file of this flavor may have {limit}",
            hint="store the weights in fewer bits (--quantize int4), or use the default flavor",
        )


def _identity(name: str, tensor: LazyTensor) -> str:
    """A key for bytes that are stored once: a quantized lm_head tied to the embedding has the same bytes, reshaped."""
    return (tensor.identity if isinstance(tensor, Packed) else "") or name


def _bytes(chunk: torch.Tensor) -> np.ndarray:
    return chunk.contiguous().view(-1).view(torch.uint8).numpy()
