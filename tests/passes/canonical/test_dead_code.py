import torch

from moec.compiler.ir.printing import format_graph
from moec.passes.canonical.dead_code import DeadCode

aten = torch.ops.aten


def test_what_nobody_uses_goes_and_inputs_stay(build, snapshot):
    x = build.input("x", 2)
    build.input("unused", 3)
    weight = build.weight("w", torch.ones(2))
    build.call(aten.sin.default, build.call(aten.neg.default, weight))
    build.weights["never_named"] = build.weights["w"]
    program = build.program(build.call(aten.cos.default, x))

    result = DeadCode().run(program)

    assert result.modified
    assert format_graph(result.program) == snapshot
    assert list(result.program.weights) == []
    build.assert_same(program, result.program)


def test_a_live_graph_is_left_alone(build):
    x, weight = build.input("x", 2), build.weight("w", torch.ones(2))
    program = build.program(build.call(aten.add.Tensor, x, weight))
    result = DeadCode().run(program)
    assert not result.modified
    assert result.program is program
