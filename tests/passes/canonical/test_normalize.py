import pytest
import torch

from moec.compiler.ir.printing import format_graph
from moec.passes.canonical.normalize import ALIASES, Normalize

aten = torch.ops.aten


def test_nothing_that_does_nothing_is_left(build, snapshot):
    x = build.input("x", 2, 3, 4)
    build.call(aten._assert_tensor_metadata.default, x, None, None, torch.float32)
    y = build.call(aten.alias.default, x)
    y = build.call(aten._to_copy.default, y, dtype=torch.float32)
    y = build.call(aten.dropout.default, y, 0.5, False)
    y = build.call(aten.mul.Tensor, y, 1.0)
    y = build.call(aten.add.Tensor, y, 0)
    y = build.call(aten.expand.default, y, [2, 3, 4])
    y = build.call(aten.slice.Tensor, y, 1, 0, (1 << 63) - 1)
    y = build.call(aten.transpose.int, build.call(aten.transpose.int, y, 1, 2), -1, 1)
    y = build.call(aten.permute.default, y, [0, 1, 2])
    y = build.call(aten.cat.default, [y], 1)
    y = build.call(aten.relu.default, build.call(aten.clone.default, y, memory_format=torch.contiguous_format))
    y = build.call(aten.view.default, build.call(aten.view.default, y, [-1, 4]), [2, 12])
    program = build.program(build.call(aten.concat.default, [y, build.call(aten.type_as.default, y, y)], 1))

    result = Normalize().run(program)

    assert result.modified
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program)


def test_a_reshape_that_undoes_another_goes_with_it(build):
    x = build.input("x", 2, 6)
    y = build.call(aten.view.default, build.call(aten.view.default, x, [3, 4]), [2, 6])
    result = Normalize().run(build.program(build.call(aten.relu.default, y)))
    (relu,) = result.program.nodes(aten.relu.default)
    assert relu.args[0].op == "placeholder"


def test_an_axis_that_goes_and_comes_back_stays(build):
    x = build.input("x", 6, 1, 4)
    y = build.call(aten.unsqueeze.default, build.call(aten.squeeze.dim, x, 1), 1)
    (relu,) = Normalize().run(build.program(build.call(aten.relu.default, y))).program.nodes(aten.relu.default)
    assert relu.args[0].op == "placeholder"


def test_an_axis_that_comes_back_elsewhere_does_not(build):
    x = build.input("x", 6, 1, 4)
    y = build.call(aten.unsqueeze.default, build.call(aten.squeeze.dim, x, 1), 2)
    assert not Normalize().run(build.program(build.call(aten.relu.default, y))).modified


def test_what_does_something_stays(build):
    x = build.input("x", 2, 3)
    y = build.call(aten.mul.Tensor, x, 2.0)
    y = build.call(aten.add.Tensor, y, 1.0)
    y = build.call(aten.slice.Tensor, y, 1, 0, 2)
    y = build.call(aten.expand.default, build.call(aten.unsqueeze.default, y, 0), [5, 2, 2])
    y = build.call(aten.transpose.int, build.call(aten.transpose.int, y, 0, 1), 1, 2)
    y = build.call(aten._to_copy.default, y, dtype=torch.float64)
    y = build.call(aten.dropout.default, y, 0.5, True)
    program = build.program(y)

    result = Normalize().run(program)

    assert not result.modified
    assert result.program is program


def test_division_that_rounds_is_no_division_by_one(build):
    x = build.input("x", 4)
    program = build.program(build.call(aten.div.Tensor_mode, x, 1.0, rounding_mode="floor"))
    assert not Normalize().run(program).modified


def test_adding_zero_that_widens_stays(build):
    x = build.input("x", 4, dtype=torch.int64)
    program = build.program(build.call(aten.add.Tensor, x, 0.0))
    assert not Normalize().run(program).modified


@pytest.mark.parametrize(
    ("alias", "op"),
    [
        (aten.__or__.Tensor, aten.bitwise_or.Tensor),
        (aten.__and__.Tensor, aten.bitwise_and.Tensor),
        (aten.__xor__.Tensor, aten.bitwise_xor.Tensor),
        (aten.multiply.Tensor, aten.mul.Tensor),
        (aten.greater_equal.Tensor, aten.ge.Tensor),
        (aten.true_divide.Tensor, aten.div.Tensor),
    ],
)
def test_an_op_has_one_name(alias, op, build):
    x, y = (build.input(name, 2, 3) for name in "xy")
    if "_" in alias.name().split("::")[1][:1]:
        x, y = (build.call(aten.gt.Scalar, value, 0.0) for value in (x, y))
    program = build.program(build.call(aten._to_copy.default, build.call(alias, x, y), dtype=torch.float32))
    result = Normalize().run(program)
    assert not result.program.nodes(alias)
    assert len(result.program.nodes(op)) == 1
    build.assert_same(program, result.program)


def test_every_alias_computes_what_its_op_does():
    x, y = torch.tensor([3, -2, 5]), torch.tensor([1, 2, 2])
    pairs = [
        (alias, op) for alias, op in ALIASES.items() if alias._overloadname == "Tensor" and alias != aten.clip.Tensor
    ]
    assert len(pairs) > 12
    for alias, op in pairs:
        assert torch.equal(alias(x, y), op(x, y)), alias
