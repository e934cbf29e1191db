"""Lower a Program to an ML program: one function per phase, with shared weights and states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import ATTENTION, EXPERTS, INDEXER, Program
from moec.compiler.ir.specialise import specialise, without_padding
from moec.targets.common.added_inputs import default_values, row_widths
from moec.targets.common.refusals import RefusedError, refuse
from moec.targets.common.table import lookup
from moec.targets.coreml.context import MIL_NAMES, Cache, Context, Settings, Var
from moec.targets.coreml.flavors import Flavor
from moec.targets.coreml.interface import INTERFACES, Entry, Interface, Shape, added_shape, extra_inputs, refusals
from moec.targets.coreml.library import coremltools_module
from moec.targets.coreml.lowerings.table import TABLE
from moec.targets.coreml.metadata import METADATA_KEY, LayerValues, ModelMetadata
from moec.targets.coreml.state import StateLayout, States, state_layout
from moec.targets.coreml.weights import WeightPool, identifier


@dataclass
class Built:
    """The MIL program and what is known about it.

    `expert_tensors` maps each stack of experts to the name of their constants, with `{}` for the index of the expert.
    `defaults` and `row_widths` are those of `moec.targets.common.added_inputs`, by the names of the model's inputs.
    `layers` holds for each function hidden_states, indices, weights and output of every experts node.
    """

    program: Any
    interface: Interface
    layout: StateLayout
    pool: WeightPool
    expert_tensors: dict[str, str] = field(default_factory=dict)
    layers: dict[str, list[list[Var]]] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    ops: dict[str, dict[str, int]] = field(default_factory=dict)
    defaults: dict[str, list[float]] = field(default_factory=dict)
    row_widths: dict[str, int] = field(default_factory=dict)


def build(program: Program, shape: Shape, flavor: Flavor = Flavor.DEFAULT, *, blank: bool = False) -> Built:
    """Lower `program`.

    Args:
        program: The Program to lower, with dynamic batch, sequence and past.
        shape: Sizes of the model.
        flavor: Calling convention of its functions.
        blank: Whether to read no weights, for a lint that only needs to know what is refused.

    Raises:
            LoweringError: An op is not supported, or the flavor does not support the model.
        UnsupportedModelError: The model needs a padding mask outside of attention.
    """
    if refused := refusals(program, flavor):
        raise RefusedError(refused[0].where, refused[0].reason, hint=refused[0].hint)
    made, interface = coremltools_module("coremltools.converters.mil.mil").Program(), INTERFACES[flavor]
    layout = state_layout(program, shape.context)
    built = Built(made, interface, layout, WeightPool(blank=blank))
    built.defaults = {identifier(name): values for name, values in default_values(program).items()}
    built.row_widths = {identifier(name): width for name, width in row_widths(program).items()}
    with _fresh_names():
        for entry in interface.entries:
            fixed = specialise(program, batch=1, sequence=entry.tokens)
            made.add_function(entry.name, _Function(without_padding(fixed), entry, shape, built).build())
    made.default_function_name = interface.entries[0].name
    made.export_as_multifunction = len(interface.entries) > 1
    made.skip_all_passes = True
    return built


@contextmanager
def _fresh_names() -> Iterator[None]:
    """Restart the builder's numbering of names, so that a rebuild in the same process gives the same names."""
    counts = coremltools_module("coremltools.converters.mil").Builder.name_count
    kept = dict(counts)
    counts.clear()
    try:
        yield
    finally:
        counts.clear()
        counts.update(kept)


class _Function:
    """Lowers one function."""

    def __init__(self, program: Program, entry: Entry, shape: Shape, built: Built) -> None:
        self._program, self._entry, self._shape, self._built = program, entry, shape, built
        self._mil = coremltools_module("coremltools.converters.mil.mil")
        self._mb = coremltools_module("coremltools.converters.mil").Builder

    def build(self) -> Any:
        types, target = self._mil.types, coremltools_module().target
        interface, tokens = self._built.interface, self._entry.tokens
        length, added = tokens or self._mil.get_new_symbol(), extra_inputs(self._program)
        inputs = interface.inputs(self._mb, types, length)
        for spec in added:
            kind = types.string_to_builtin(MIL_NAMES[spec.dtype])
            inputs[identifier(spec.name)] = self._mb.placeholder(added_shape(spec, length), kind)
        for name, size in self._built.layout.states().items():
            inputs[name] = self._mb.state_tensor_placeholder(size, types.fp16)
        with self._mil.Function(inputs, opset_version=target.iOS18) as function:
            function.set_outputs([self._body(function.inputs)])
        if tokens is None:
            function.input_types = interface.ranges(self._shape, added)
        self._built.ops[self._entry.name] = count_ops(function)
        return function

    def _body(self, inputs: Mapping[str, Var]) -> Var:
        program, mb, built = self._program, self._mb, self._built
        specs = [*program.inputs, *(state.input for state in program.states)]
        placeholders = program.graph.find_nodes(op="placeholder")
        names = {node: spec.name for node, spec in zip(placeholders, specs, strict=True)}
        settings = Settings(self._shape.context, self._shape.chunk, self._entry.skip_experts)
        ctx = Context(program, mb, built.pool, settings)
        states = {name: inputs[name] for name in built.layout.states()}
        new_tokens = built.interface.new_tokens(ctx, inputs, built.layout.states())
        kept = States(ctx, built.layout, states, new_tokens.start, new_tokens.stop)
        ctx.bind_cache(Cache(names, kept, new_tokens.first))
        if "past_sequence" in program.dims:
            # The number of past tokens is not the length of the states, which is fixed.
            ctx.memo["size", str(program.dims["past_sequence"])] = mb.squeeze(x=new_tokens.past, axes=[0])
        known = {
            "input_ids": inputs[built.interface.token_input],
            # Without padding, the position of a token is its index in the sequence.
            "cache_position": new_tokens.positions,
            "position_ids": mb.expand_dims(x=new_tokens.positions, axes=ctx.ints(0)),
            **{spec.name: inputs[identifier(spec.name)] for spec in extra_inputs(program)},
            **{state.input.name: kept.read(state.input.name) for state in program.replaced},
        }
        for node, name in names.items():
            self._bind(ctx, node, known.get(name))
        for node in program.graph.nodes:
            if node.op == "call_function":
                ctx.set(node, lookup(TABLE, node, "coreml")(ctx, node))
            if node.target is EXPERTS:
                own = Experts.of(node)
                values = [ctx.tensor(item) for item in (own.hidden_states, own.indices, own.weights, node)]
                built.layers.setdefault(self._entry.name, []).append(values)
        outputs = program.outputs()
        kept.replace({state.input.name: ctx.tensor(outputs[state.output.name]) for state in program.replaced})
        logits = ctx.tensor(outputs["logits"])
        built.rejections += ctx.rejections
        built.expert_tensors |= ctx.expert_tensors
        return mb.identity(x=logits, name="logits")

    def _bind(self, ctx: Context, node: fx.Node, value: Var | None) -> None:
        if value is not None:
            # Core ML has no scalar inputs.
            ctx.set(node, value if node.meta["val"].ndim else ctx.mb.squeeze(x=value, axes=ctx.ints(0)))
        elif any(user.target not in (ATTENTION, INDEXER, torch.ops.aten.sym_size.int) for user in node.users):
            raise refuse(node, "an op other than attention reads the KV cache")


def count_ops(function: Any) -> dict[str, int]:
    """Op type -> number of its operations in `function`, without constants."""
    counts: dict[str, int] = {}
    pending = [function]
    while pending:
        for operation in pending.pop().operations:
            if operation.op_type != "const":
                counts[operation.op_type] = counts.get(operation.op_type, 0) + 1
            pending += operation.blocks
    return dict(sorted(counts.items()))


_DESCRIPTIONS: Mapping[str, str] = {
    "input_ids": "Token ids, int32 [1, tokens].",
    "cache_position": "Slots of these tokens in the KV cache, int32 [tokens]: past, past + 1, and so on. The slot of a "
    "token is its position.",
    "inputIds": "Token ids, int32 [1, tokens].",
    "causalMask": "Its last axis has the length of the sequence, past and new tokens together (or one more). "
    "Its values and other axes are not read: the model applies the causal mask itself.",
    "logits": "Logits of the next token after each input token, [1, tokens, vocabulary].",
    "keyCache": "Keys of the tokens so far.",
    "valueCache": "Values of the tokens so far.",
    "convState": "Last inputs of the short convolutions.",
    "recurrentState": "States of the linear-attention layers.",
    "inputs_embeds": "Embeddings of the tokens whose id is negative, [1, tokens, hidden size]; zeros for other tokens.",
}


NAME_KEY = "co.huggingface.exporters.name"
"""Metadata key under which swift-transformers looks up the model's name."""


def functions_of(spec: Any) -> list[tuple[str, Any]]:
    """Name and description of each function; with a single function, the model's own description is used."""
    several = [(function.name, function) for function in spec.description.functions]
    return several or [(next(iter(spec.mlProgram.functions)), spec.description)]


def describe(
    spec: Any, built: Built, shape: Shape, texts: Mapping[str, str], renamed: Mapping[str, Mapping[str, str]]
) -> None:
    """Add what Xcode shows (descriptions of inputs, outputs and states, author, license) and the runner's metadata.

    `renamed` is function -> name of a value in the lowering -> its name in `spec`, if they differ.
    """
    for _, function in functions_of(spec):
        for feature in (*function.input, *function.output, *function.state):
            base = next((key for key in _DESCRIPTIONS if feature.name.startswith(key)), "")
            feature.shortDescription = _DESCRIPTIONS.get(base, "")
    metadata = spec.description.metadata
    metadata.author, metadata.license = texts["author"], texts["license"]
    metadata.shortDescription, metadata.versionString = texts["description"], texts["version"]
    if built.interface.flavor is Flavor.SWIFT:
        metadata.userDefined[NAME_KEY] = texts["name"]
    metadata.userDefined[METADATA_KEY] = model_metadata(built, shape, renamed).to_json()


def model_metadata(built: Built, shape: Shape, renamed: Mapping[str, Mapping[str, str]]) -> ModelMetadata:
    """The metadata for moec's runner; for `renamed`, see `describe`."""
    return ModelMetadata(
        flavor=built.interface.flavor,
        context=shape.context,
        chunk=shape.chunk,
        experts=built.expert_tensors,
        matrices=built.pool.matrices,
        layers={
            function: [LayerValues(*(renamed[function].get(item.name, item.name) for item in layer)) for layer in found]
            for function, found in built.layers.items()
        },
        inputs=built.defaults,
        token_inputs=built.row_widths,
    )


def expert_bytes(built: Built) -> dict[str, int]:
    """Expert tensor -> bytes of its codes, scales and offsets in the weight file."""
    stored = built.pool.stored_bytes
    return {
        name: sum(size for entry, size in stored.items() if entry.startswith(f"{name}."))
        for name in sorted(built.expert_tensors)
    }


def signature(spec: Any) -> dict[str, Any]:
    """Inputs, outputs and states of each function, for moec.json."""
    return {
        name: {
            "inputs": _features(function.input),
            "outputs": _features(function.output),
            "states": _features(function.state),
        }
        for name, function in functions_of(spec)
    }


def _features(features: Sequence[Any]) -> list[dict[str, Any]]:
    rows = []
    for feature in features:
        state = feature.type.WhichOneof("Type") == "stateType"
        array = feature.type.stateType.arrayType if state else feature.type.multiArrayType
        row: dict[str, Any] = {
            "name": feature.name,
            "shape": [int(size) for size in array.shape],
            "dtype": array.ArrayDataType.Name(array.dataType).lower(),
        }
        if array.WhichOneof("ShapeFlexibility") == "shapeRange":
            row["range"] = [[int(item.lowerBound), int(item.upperBound)] for item in array.shapeRange.sizeRanges]
        rows.append(row)
    return rows


def model_files(package: Path) -> tuple[str, ...]:
    """Paths of the files of a package, relative to the folder that contains the package."""
    return tuple(sorted(str(path.relative_to(package.parent)) for path in package.rglob("*") if path.is_file()))
