"""The invariants of a Program that are checked between passes: one function per rule, and a table of the rules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moec.compiler.common.errors import MoecError
from moec.compiler.ir.program import Dim, Program, TensorSpec, module_of, moe_layers
from moec.compiler.ir.stages import BINARY, CORE

SIZE_OPERATORS = frozenset(
    {
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.truediv,
        operator.pow,
        torch.sym_max,
        torch.sym_min,
        torch.sym_not,
    }
)
"""Python functions that a graph may call: arithmetic on sizes, and `getitem` on a tuple of results."""


class InvariantError(MoecError):
    """A pass broke a rule: a fault of moec, never of the user."""


Finding = tuple[fx.Node | None, str]
"""The node that breaks a rule (None: the whole program), and the reason."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`check` yields the violations; a rule with `after` holds only once the pass of that name has run."""

    name: str
    check: Callable[[Program], Iterator[Finding]]
    after: str = ""


def check_invariants(program: Program, completed: Collection[str] = ()) -> None:
    """Check every rule.

    Args:
        program: The Program to check.
        completed: Names of the passes that have run.

    Raises:
        InvariantError: A rule is broken; the message names the rule, the node and its module.
    """
    for rule in RULES:
        if rule.after and rule.after not in completed:
            continue
        for node, reason in rule.check(program):
            where = f"%{node.name} in {module_of(node)}" if node is not None else "the program"
            raise InvariantError(
                f"{where} breaks the rule '{rule.name}': {reason}",
                hint="this is a fault of moec: please report it with the model and the recipe",
            )


def _order(program: Program) -> Iterator[Finding]:
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                yield node, f"it uses %{source.name}, which comes later or is not in the graph"
        seen.add(node)
    if not any(node.op == "output" for node in seen):
        yield None, "it has no output"


def _fake_values(program: Program) -> Iterator[Finding]:
    for node in program.graph.nodes:
        if node.op != "output" and node.meta.get("val") is None and _returns_something(node):
            yield node, "it has no fake value"


def _returns_something(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or bool(node.target._schema.returns)


def _targets(program: Program) -> Iterator[Finding]:
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield node, f"nodes of kind {node.op} are not allowed"
        elif node.op == "call_function" and not _is_known(node.target):
            yield node, f"it calls {node.target}, which is neither an op nor arithmetic on sizes"


def _is_known(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) or target in SIZE_OPERATORS


def _signature(program: Program) -> Iterator[Finding]:
    placeholders = program.graph.find_nodes(op="placeholder")
    specs = [*program.inputs, *(state.input for state in program.states)]
    if len(placeholders) != len(specs):
        yield None, f"it has {len(placeholders)} placeholders for {len(specs)} inputs and states"
        return
    for position, (node, spec) in enumerate(zip(placeholders, specs, strict=True)):
        if position < len(program.inputs) and node.target != spec.name:
            yield node, f"it stands where the input {spec.name} belongs"
        if problem := _disagreement(node.meta["val"], spec, program):
            yield node, problem


def _outputs(program: Program) -> Iterator[Finding]:
    results = program.graph.output_node().args[0]
    count = len(results) if isinstance(results, Sequence) else 1
    if count != 1 + len(program.states):
        yield None, f"it has {count} outputs; logits and {len(program.states)} states are {1 + len(program.states)}"
        return
    outputs = program.outputs()
    for state in program.states:
        if state.output.name not in outputs:
            yield None, f"the output {state.output.name} is a constant"
        elif outputs[state.output.name].meta["val"].dtype != state.output.dtype:
            yield outputs[state.output.name], f"the output {state.output.name} is not {state.output.dtype}"


def _disagreement(value: Tensor, spec: TensorSpec, program: Program) -> str:
    """How a fake value differs from the signature; empty if it does not."""
    if value.dtype != spec.dtype:
        return f"it is {value.dtype}, and {spec.name} is {spec.dtype}"
    if value.ndim != len(spec.shape) or not all(
        _fits(size, dim, program) for size, dim in zip(value.shape, spec.shape, strict=True)
    ):
        return f"its shape is {list(value.shape)}, and that of {spec.name} is {list(spec.shape)}"
    return ""


def _fits(size: Any, dim: Dim, program: Program) -> bool:
    if isinstance(dim, int):
        return isinstance(size, int) and size == dim
    return isinstance(size, torch.SymInt) and dim in program.dims


def _weights(program: Program) -> Iterator[Finding]:
    for node in program.graph.find_nodes(op="get_attr"):
        name, value = str(node.target), node.meta["val"]
        if program.weights.resolve(name) not in program.weights:
            yield node, f"the weight store has no {name}"
            continue
        stored = program.weights[name]
        if tuple(value.shape) != tuple(stored.shape):
            yield node, f"it is {list(value.shape)}, and the weight {name} is {list(stored.shape)}"
        elif _kind(value.dtype) != _kind(stored.dtype):
            yield node, f"it is {value.dtype}, and the weight {name} is {stored.dtype}"


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "real" if dtype.is_floating_point else str(dtype)


def _layers(program: Program) -> Iterator[Finding]:
    rows = moe_layers(program.graph)
    if rows != program.layers:
        nodes = {node.name: node for node in program.graph.nodes}
        for row, known in zip(rows, program.layers, strict=False):
            if row != known:
                yield nodes[row.node], f"the table of MoE layers says {known}"
        yield None, f"the graph has {len(rows)} MoE layers, and the table {len(program.layers)}"


def _real(program: Program) -> Iterator[Finding]:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, Tensor) and item.dtype.is_complex for item in values):
            yield node, "it is complex"


def _complete(program: Program) -> Iterator[Finding]:
    for node in program.graph.nodes:
        if node.target in CORE and isinstance(node.target, torch._ops.OpOverload):
            arguments = node.target._schema.arguments
            positions = sum(not argument.kwarg_only for argument in arguments)
            if len(node.args) != positions:
                yield node, f"it has {len(node.args)} arguments by position, and {node.target} takes {positions}"


def _one_dtype(program: Program) -> Iterator[Finding]:
    for node in program.graph.nodes:
        if node.target in BINARY:
            dtypes = {str(value.dtype) for item in node.args[:2] if (value := _tensor(item)) is not None}
            if len(dtypes) > 1:
                yield node, f"its operands are {' and '.join(sorted(dtypes))}"


def _tensor(argument: Any) -> Tensor | None:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value if isinstance(value, Tensor) else None


RULES = (
    Rule("a node comes after its inputs", _order),
    Rule("a node has a fake value", _fake_values),
    Rule("a node calls an op", _targets),
    Rule("placeholders are the inputs and states", _signature),
    Rule("outputs are the logits and states", _outputs),
    Rule("a get_attr names a weight of its shape", _weights),
    Rule("the table of MoE layers is that of the graph", _layers),
    Rule("no value is complex", _real, after="real-rotary"),
    Rule("a call of a core op has all its arguments", _complete, after="decompose"),
    Rule("both sides of arithmetic have one dtype", _one_dtype, after="decompose"),
)
