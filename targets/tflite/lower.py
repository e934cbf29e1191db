"""Lower a Program to a LiteRT model: one subgraph with static shapes per signature, and shared weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import ATTENTION, EXPERTS, INDEXER, Program
from moec.compiler.ir.specialise import specialise, without_padding
from moec.targets.common.added_inputs import default_values, row_widths
from moec.targets.common.refusals import RefusedError, first_few, refuse
from moec.targets.common.table import lookup
from moec.targets.tflite.context import TENSOR_TYPES, Context, Settings, Shared
from moec.targets.tflite.engine import TOKEN_COUNT
from moec.targets.tflite.lowerings.table import TABLE
from moec.targets.tflite.model import Graph, Model, Value
from moec.targets.tflite.positions import use_cache_position
from moec.targets.tflite.reader import LEGACY_RUNTIME, METADATA
from moec.targets.tflite.states import add_state, add_token_count, state_name, state_without_padding
from moec.targets.tflite.weights import Weights


def build(
    program: Program, *, lengths: Sequence[int], capacity: int, branches: bool, legacy: bool = False
) -> tuple[Model, Shared]:
    """Lower `program` to the signatures `decode` and `prefill_N`.

    Args:
        program: The Program to lower, with dynamic batch, sequence and past.
        lengths: Numbers of tokens per step, one signature each; 1 is `decode`.
        capacity: Slots of the KV cache.
        branches: Whether each expert is the branch of an IF, which is skipped where no token needs it.
        legacy: Whether the file is for tflite-runtime 2.14 rather than LiteRT.

    Returns:
            The model, with weights that are read when it is written, and what its signatures share.

    Raises:
            LoweringError: An op, or the format of a weight, is not supported.
    """
    plain = use_cache_position(without_padding(program))
    shared = Shared(plain, Weights(plain))
    model = Model(description="made by moec")
    layers: dict[str, list[list[int]]] = {}
    for length in lengths:
        static = specialise(plain, batch=1, sequence=length, past_sequence=capacity - length)
        name = signature_name(length)
        model.signatures[name], layers[name] = _signature(static, shared, Settings(capacity, branches, legacy), name)
    facts: dict[str, Any] = {
        "capacity": capacity,
        "experts": shared.experts,
        "tables": sorted(shared.tables),
        "layers": layers,
        "prefill_lengths": [n for n in lengths if n > 1],
        "rotary_borders": list(program.rotary_borders),
    }
    facts["inputs"] = default_values(plain)
    facts["token_inputs"] = row_widths(plain)
    if legacy:
        facts["runtime"] = LEGACY_RUNTIME
        _refuse_dynamic(model)
    model.metadata[METADATA] = json.dumps(facts, sort_keys=True).encode()
    return model, shared


def _refuse_dynamic(model: Model) -> None:
    wrong = [weight.name for weight in model.weights() if weight.dynamic]
    if wrong:
        raise RefusedError(
            first_few(wrong),
            "tflite-runtime 2.14 silently computes zeros for products of per-channel int8 weights and activations "
            "rounded to int8",
            hint="use --quantize fp16 or int8:channel, whose activations stay float, or --runtime litert",
        )


def signature_name(length: int) -> str:
    """Name of the signature that takes `length` tokens."""
    return "decode" if length == 1 else f"prefill_{length}"


def _signature(program: Program, shared: Shared, settings: Settings, name: str) -> tuple[Graph, list[list[int]]]:
    """The subgraph of a signature, and for each experts node the tensor indices of the `ROLES` in experts.py."""
    ctx, layers = Context(shared, settings, Graph(name)), []
    count = _inputs(ctx, program)
    for node in program.graph.nodes:
        if node.op == "call_function":
            ctx.set(node, _constant(ctx, node) if _is_constant(ctx, node) else lookup(TABLE, node, "tflite")(ctx, node))
            if node.target is EXPERTS:
                own = Experts.of(node)
                layers.append([ctx.tensor(item).index for item in (own.hidden_states, own.indices, own.weights, node)])
    _outputs(ctx, program, count)
    return ctx.graph, layers


def _inputs(ctx: Context, program: Program) -> Value | None:
    """Add the inputs `tokens` and `input_pos`, from which all inputs of the Program except states are computed.

    Returns:
        The number of tokens that are not padding, if a state depends on it; else None.
    """
    tokens = next(spec for spec in program.inputs if spec.name == "input_ids")
    length = tokens.shape[1]
    assert isinstance(length, int)
    ids = ctx.graph.input("tokens", (1, length), "INT32")
    positions = ctx.graph.input("input_pos", (length,), "INT32")
    made: dict[str, Callable[[], Value]] = {
        "input_ids": lambda: ids,
        "cache_position": lambda: positions,
        "position_ids": lambda: ctx.reshape(positions, (1, length)),
    }
    added = program.input_defaults
    placeholders = iter(program.graph.find_nodes(op="placeholder"))
    for spec in program.inputs:
        node = next(placeholders)
        if spec.name in added:
            shape = [int(size) for size in spec.shape]
            ctx.set(node, ctx.graph.input(spec.name, shape, TENSOR_TYPES[spec.dtype]))
        elif spec.name not in made:
            raise refuse(node, f"the input {spec.name} is not supported in LiteRT's signatures")
        elif node.users:
            ctx.set(node, made[spec.name]())
    for node, state in zip(placeholders, program.states, strict=True):
        add_state(ctx, node, state)
    if not program.replaced or length == 1:
        return None
    return ctx.shared_value(TOKEN_COUNT, lambda: add_token_count(ctx))


def _outputs(ctx: Context, program: Program, count: Value | None) -> None:
    names = {state.output.name: state_name(state.kind, state.layer) for state in program.states}
    replaced = {state.output.name for state in program.replaced}
    taken: set[Value] = set()
    for name, node in program.outputs().items():
        value = ctx.tensor(node) if count is None or name not in replaced else state_without_padding(ctx, node, count)
        if value in taken:
            raise refuse(node, "one value as two outputs is not supported")
        taken.add(value)
        ctx.graph.output(names.get(name, name), value)


def _is_constant(ctx: Context, node: fx.Node) -> bool:
    """Whether all arguments of `node` are constants, such as sizes and what was computed from them."""
    return node.target not in (ATTENTION, EXPERTS, INDEXER) and all(
        ctx.known(argument) is not None for argument in node.all_input_nodes
    )


def _constant(ctx: Context, node: fx.Node) -> Any:
    args: Any = fx.map_arg(node.args, ctx.known)
    kwargs: Any = fx.map_arg(node.kwargs, ctx.known)
    assert callable(node.target)
    return node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})


def computed(program: Program) -> list[fx.Node]:
    """The nodes that remain to be computed at run time when all sizes are static."""
    known: set[fx.Node] = set()
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int) or all(argument in known for argument in node.all_input_nodes):
            known.add(node)
        else:
            found.append(node)
    return found


def signature(program: Program, model: Model) -> Mapping[str, Any]:
    """The inputs and outputs of every signature, and the states, for moec.json."""

    def rows(values: Sequence[tuple[str, Value]]) -> list[dict[str, Any]]:
        return [{"name": name, "shape": list(value.shape), "dtype": value.dtype.lower()} for name, value in values]

    return {
        "signatures": {
            name: {"inputs": rows(graph.inputs), "outputs": rows(graph.outputs)}
            for name, graph in model.signatures.items()
        },
        "states": [
            {"layer": state.layer, "kind": state.kind, "name": state_name(state.kind, state.layer)}
            for state in program.states
        ],
    }
