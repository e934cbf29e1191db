from moec.compiler.ir.interpreter import Interpreter
from moec.compiler.ir.printing import format_graph
from moec.passes.canonical.unify_sizes import UnifySizes


def test_every_axis_is_one_symbol(captured, feeds, snapshot):
    program = captured["mixtral"]

    result = UnifySizes().run(program)

    assert result.modified
    inputs = [line for line in format_graph(result.program).splitlines() if line.endswith("= input")]
    assert "\n".join(inputs) == snapshot
    values = feeds(program, 2, 3, 4)
    want, got = (Interpreter(p).run(values)["logits"] for p in (program, result.program))
    assert got.equal(want)


def test_unified_sizes_are_left_alone(captured):
    program = UnifySizes().run(captured["mixtral"]).program
    result = UnifySizes().run(program)
    assert not result.modified
    assert result.program is program
