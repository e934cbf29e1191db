import operator

import pytest
import torch

from moec.compiler.ir.invariants import InvariantError, check_invariants
from moec.compiler.ir.weights import Constant

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program(capture_of):
    return capture_of("mixtral")


def first(graph, target):
    return next(node for node in graph.nodes if node.target == target)


def disorder(graph):
    graph.output_node().prepend(first(graph, aten.embedding.default))


def no_fake_value(graph):
    del first(graph, aten.embedding.default).meta["val"]


def python_function(graph):
    first(graph, operator.getitem).target = print


def module_call(graph):
    first(graph, aten.embedding.default).op = "call_module"


def renamed_input(graph):
    first(graph, "input_ids").target = "ids"


def another_dtype(graph):
    node = first(graph, "input_ids")
    node.meta["val"] = node.meta["val"].to(torch.int32)


def another_rank(graph):
    node = first(graph, "past_0_key")
    node.meta["val"] = node.meta["val"][0]


def missing_state(program):
    return program.replace(states=program.states[:-1])


def missing_output(graph):
    output = graph.output_node()
    output.args = (output.args[0][:-1],)


def narrow_output(graph):
    output = graph.output_node()
    results = list(output.args[0])
    results[-1].meta["val"] = results[-1].meta["val"].half()


def unknown_weight(graph):
    first(graph, "model.norm.weight").target = "model.norm.wait"


def weight_of_another_shape(program):
    return program.replace(weights=program.weights.with_tensors({"model.norm.weight": Constant(torch.ones(3))}))


def weight_of_another_kind(program):
    ones = Constant(torch.ones(64, dtype=torch.int64))
    return program.replace(weights=program.weights.with_tensors({"model.norm.weight": ones}))


def lost_layer(program):
    return program.replace(layers=program.layers[:1])


def renamed_layer(graph):
    node = first(graph, torch.ops.moec.experts.default)
    node.meta["module"] = "elsewhere"


GRAPHS = [
    (disorder, "comes after its inputs", "embedding"),
    (no_fake_value, "has a fake value", "embedding"),
    (python_function, "calls an op", "print"),
    (module_call, "calls an op", "call_module"),
    (renamed_input, "inputs and states", "where the input input_ids belongs"),
    (another_dtype, "inputs and states", "torch.int32"),
    (another_rank, "inputs and states", "past_0_key"),
    (missing_output, "logits and states", "outputs"),
    (narrow_output, "logits and states", "present.1.value"),
    (unknown_weight, "names a weight", "no model.norm.wait"),
    (renamed_layer, "table of MoE layers", "experts in elsewhere"),
]


PROGRAMS = [
    (missing_state, "inputs and states", "placeholders for"),
    (weight_of_another_shape, "names a weight", r"model.norm.weight is \[3\]"),
    (weight_of_another_kind, "names a weight", "torch.int64"),
    (lost_layer, "table of MoE layers", "2 MoE layers, and the table 1"),
]


@pytest.mark.parametrize(("damage", "rule", "detail"), GRAPHS, ids=[row[0].__name__ for row in GRAPHS])
def test_a_broken_rule_is_named_with_its_node(program, damage, rule, detail):
    graph = program.copy_graph()
    damage(graph)
    with pytest.raises(InvariantError, match=rule) as caught:
        check_invariants(program.replace(graph=graph))
    assert caught.value.exit_code == 70
    assert caught.match(detail)


@pytest.mark.parametrize(("damage", "rule", "detail"), PROGRAMS, ids=[row[0].__name__ for row in PROGRAMS])
def test_what_goes_with_the_graph_must_fit_it(program, damage, rule, detail):
    with pytest.raises(InvariantError, match=rule) as caught:
        check_invariants(damage(program))
    assert caught.match(detail)


def test_a_captured_program_breaks_none(program):
    check_invariants(program)


def test_complex_numbers_are_a_fault_once_they_are_written_out(program):
    graph = program.copy_graph()
    node = first(graph, aten.cos.default)
    node.meta["val"] = node.meta["val"].to(torch.complex64)
    check_invariants(program.replace(graph=graph))
    with pytest.raises(InvariantError, match="no value is complex"):
        check_invariants(program.replace(graph=graph), completed=["real-rotary"])


def left_out_argument(graph):
    node = first(graph, aten.linear.default)
    node.args = node.args[:-1]


def two_dtypes(graph):
    node = first(graph, aten.add.Tensor)
    node.args[0].meta["val"] = node.args[0].meta["val"].to(torch.float16)


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (left_out_argument, "2 arguments by position, and aten.linear.default takes 3"),
        (two_dtypes, "operands are torch.float16 and torch.float32"),
    ],
)
def test_core_ops_are_complete_once_they_are_decomposed(program_of, damage, detail):
    core = program_of("mixtral")
    check_invariants(core, ["decompose"])
    graph = core.copy_graph()
    damage(graph)
    with pytest.raises(InvariantError, match=detail):
        check_invariants(core.replace(graph=graph), ["decompose"])
