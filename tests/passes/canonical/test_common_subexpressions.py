import torch

from moec.compiler.ir.printing import format_graph
from moec.passes.canonical.common_subexpressions import CommonSubexpressions

aten = torch.ops.aten


def test_equal_calls_become_one(build, snapshot):
    x = build.input("x", 2, 3)
    sides = [build.call(aten.mul.Tensor, build.call(aten.unsqueeze.default, x, 1), 2.0) for _ in range(2)]
    program = build.program(build.call(aten.cat.default, sides, 1))

    result = CommonSubexpressions().run(program)

    assert result.modified
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program)


def test_equal_sizes_become_one(captured):
    program = captured["mixtral"]
    graph = program.copy_graph()
    first = next(node for node in graph.nodes if node.target is aten.sym_size.int)
    with graph.inserting_after(first):
        again = graph.call_function(aten.sym_size.int, (first.args[0], first.args[1] - first.args[0].meta["val"].ndim))
    again.meta = dict(first.meta)
    result = CommonSubexpressions().run(program.replace(graph=graph))
    assert result.modified
    assert format_graph(result.program) == format_graph(CommonSubexpressions().run(program).program)


def test_numbers_of_another_type_or_sign_are_not_equal(build):
    x = build.input("x", 2, dtype=torch.int64)
    sides = [build.call(aten.mul.Tensor, x, factor) for factor in (1, 1.0, True, 0.0, -0.0)]
    program = build.program(build.call(aten.cat.default, sides, 0))
    result = CommonSubexpressions().run(program)
    assert not result.modified
    assert result.program is program


def test_two_draws_of_a_random_number_stay_two(build):
    x = build.input("x", 2)
    program = build.program(
        build.call(aten.add.Tensor, build.call(aten.rand_like.default, x), build.call(aten.rand_like.default, x))
    )
    assert not CommonSubexpressions().run(program).modified


def test_equal_moe_layers_stay_two_rows_of_the_table(build):
    x = build.input("x", 2, 4)
    indices = build.call(aten.zeros.default, [2, 1], dtype=torch.int64)
    weights = build.call(aten.ones.default, [2, 1])
    up, down = build.weight("up", torch.ones(2, 6, 4)), build.weight("down", torch.ones(2, 4, 3))
    attributes = ("silu", True, False, False, 1.0, 0.0, 0.0)
    layers = [
        build.call(torch.ops.moec.experts.default, x, indices, weights, up, None, down, None, *attributes)
        for _ in range(2)
    ]
    program = build.program(build.call(aten.add.Tensor, *layers))
    assert len(CommonSubexpressions().run(program).program.layers) == 2
