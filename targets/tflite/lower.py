"""Lower a Program to a LiteRT model: one subgraph per signature, shapes fixed, weights shared."""

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
from moec.targets.common.refusals import RefusedError, listed, refuse
from moec.targets.common.table import lookup
from moec.targets.tflite.context import TENSOR_TYPES, Context, Settings, Shared
from moec.targets.tflite.engine import TOKEN_COUNT
from moec.targets.tflite.lowerings.table import TABLE
from moec.targets.tflite.model import Graph, Model, Value
from moec.targets.tflite.positions import from_input
from moec.targets.tflite.reader import METADATA, OLDER
from moec.targets.tflite.states import add_state, add_token_count, state_name, unpadded
from moec.targets.tflite.weights import Weights


def build(
    program: Program, *, lengths: Sequence[int], capacity: int, branches: bool, older: bool = False
) -> tuple[Model, Shared]:
    """Lower `program` to the signatures `decode` and `prefill_N`.

    Args:
        program: What is lowered; dynamic in batch, sequence and past.
        lengths: Tokens of a step, one signature each; 1 is `decode`.
        capacity: Slots of the KV cache.
        branches: Whether an expert may be a branch, which is skipped where no token needs it.
        older: Whether the file is for tflite-runtime 2.14 instead of LiteRT.

    Returns:
        The model, whose weights are still to be read, and what was found on the way.

    Raises:
        LoweringError: An op, or the format of a weight, has no form.
    """
    plain = from_input(without_padding(program))
    shared = Shared(plain, Weights(plain))
    model = Model(description="made by moec")
    layers: dict[str, list[list[int]]] = {}
    for length in lengths:
        static = specialise(plain, batch=1, sequence=length, past_sequence=capacity - length)
        name = signature_name(length)
        model.signatures[name], layers[name] = _signature(static, shared, Settings(capacity, branches, older), name)
    facts: dict[str, Any] = {
        "capacity": capacity,
        "experts": shared.experts,
        "layers": layers,
        "prefill_lengths": [n for n in lengths if n > 1],
    }
    facts["inputs"] = default_values(plain)
    facts["token_inputs"] = row_widths(plain)
    if older:
        facts["runtime"] = OLDER
        _refuse_dynamic(model)
    model.metadata[METADATA] = json.dumps(facts, sort_keys=True).encode()
    return model, shared


def _refuse_dynamic(model: Model) -> None:
    wrong = [weight.name for weight in model.weights() if weight.dynamic]
    if wrong:
        raise RefusedError(
            listed(wrong),
            "tflite-runtime 2.14 gives zeros, silently, for products of int8 weights that have a scale per row with "
            "activations that are rounded to int8",
            hint="--quantize fp16 and int8:channel, whose activations stay float, are right there; or --runtime litert",
        )


def signature_name(length: int) -> str:
    """Name of the signature that takes `length` tokens."""
    return "decode" if length == 1 else f"prefill_{length}"


def _signature(program: Program, shared: Shared, settings: Settings, name: str) -> tuple[Graph, list[list[int]]]:
    """The subgraph of a signature; and of each experts node its hidden states, indices, weights and result."""
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
    """`tokens` and `input_pos`, from which every input of the Program but the states follows.

    Returns:
        The number of tokens that are no padding, where a state depends on it.
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
            raise refuse(node, f"the input {spec.name} has no place in LiteRT's signatures")
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
        value = ctx.tensor(node) if count is None or name not in replaced else unpadded(ctx, node, count)
        if value in taken:
            raise refuse(node, "two outputs of one value are not supported")
        taken.add(value)
        ctx.graph.output(names.get(name, name), value)


def _is_constant(ctx: Context, node: fx.Node) -> bool:
    """Whether everything that `node` reads is known: sizes are, and what was computed from them."""
    return node.target not in (ATTENTION, EXPERTS, INDEXER) and all(
        ctx.known(argument) is not None for argument in node.all_input_nodes
    )


def _constant(ctx: Context, node: fx.Node) -> Any:
    args: Any = fx.map_arg(node.args, ctx.known)
    kwargs: Any = fx.map_arg(node.kwargs, ctx.known)
    assert callable(node.target)
    return node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})


def computed(program: Program) -> list[fx.Node]:
    """Calls that are not constant once the sizes are."""
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
    """Inputs, outputs and states of every signature, for moec.json."""

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
