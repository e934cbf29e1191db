import pytest
import torch

from moec.compiler.ir.printing import format_graph
from moec.passes.fuse.rms_norm import RmsNorm
from tests.support.checks import assert_left_alone

aten = torch.ops.aten
WIDTH = 6


def mean_square(build, x, eps=1e-5):
    square = build.call(aten.pow.Tensor_Scalar, x, 2)
    return build.call(aten.add.Tensor, build.call(aten.mean.dim, square, [-1], True), eps)


def weight(build, dtype=torch.float32):
    return build.weight("norm.weight", torch.linspace(0.5, 1.5, WIDTH, dtype=dtype))


def llama(build, x):
    scaled = build.call(aten.mul.Tensor, x, build.call(aten.rsqrt.default, mean_square(build, x)))
    return build.call(aten.mul.Tensor, weight(build), scaled)


def power(build, x):
    factor = build.call(aten.pow.Tensor_Scalar, mean_square(build, x), -0.5)
    return build.call(aten.mul.Tensor, build.call(aten.mul.Tensor, factor, x), weight(build))


def product_and_division(build, x):
    square = build.call(aten.mul.Tensor, x, x)
    variance = build.call(aten.add.Tensor, build.call(aten.mean.dim, square, [2], True), 1e-5)
    return build.call(aten.div.Tensor, x, build.call(aten.sqrt.default, variance))


def square_and_reciprocal(build, x):
    mean = build.call(aten.mean.dim, build.call(aten.square.default, x), [-1], True)
    root = build.call(aten.pow.Tensor_Scalar, build.call(aten.add.Tensor, mean, 1e-5), 0.5)
    return build.call(aten.mul.Tensor, x, build.call(aten.reciprocal.default, root))


def fused(build, x):
    return build.call(aten.rms_norm.default, x, [WIDTH], weight(build), 1e-5)


def fused_without_epsilon(build, x):
    return build.call(aten.rms_norm.default, x, [WIDTH])


def without_epsilon(build, x):
    mean = build.call(aten.mean.dim, build.call(aten.square.default, x), [-1], True)
    return build.call(aten.mul.Tensor, x, build.call(aten.rsqrt.default, mean))


FORMS = [
    llama,
    power,
    product_and_division,
    square_and_reciprocal,
    fused,
    fused_without_epsilon,
    without_epsilon,
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_one_op(build, form):
    program = build.program(form(build, build.input("x", 2, 3, WIDTH)))

    result = RmsNorm().run(program)

    assert result.modified
    (norm,) = (node for node in result.program.graph.nodes if node.op == "call_function")
    assert norm.target is torch.ops.moec.rms_norm.default
    assert norm.meta["module"] == "block"
    build.assert_same(program, result.program)


def cast_first(build, x):
    wide = build.call(aten._to_copy.default, x, dtype=torch.float32)
    scaled = build.call(aten.mul.Tensor, wide, build.call(aten.rsqrt.default, mean_square(build, wide)))
    narrow = build.call(aten._to_copy.default, scaled, dtype=torch.float16)
    return build.call(aten.mul.Tensor, weight(build, torch.float16), narrow)


def cast_last(build, x):
    wide = build.call(aten._to_copy.default, x, dtype=torch.float32)
    scaled = build.call(aten.mul.Tensor, wide, build.call(aten.rsqrt.default, mean_square(build, wide)))
    return build.call(aten._to_copy.default, build.call(aten.mul.Tensor, scaled, weight(build)), dtype=torch.float16)


@pytest.mark.parametrize("form", [cast_first, cast_last])
def test_casts_are_taken_in(build, form, snapshot):
    program = build.program(form(build, build.input("x", 2, WIDTH, dtype=torch.float16)))
    result = RmsNorm().run(program)
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program, tolerance=1e-3)


def test_a_result_in_float32_starts_from_float32(build, snapshot):
    wide = build.call(aten._to_copy.default, build.input("x", 2, WIDTH, dtype=torch.float16), dtype=torch.float32)
    scaled = build.call(aten.mul.Tensor, wide, build.call(aten.rsqrt.default, mean_square(build, wide)))
    program = build.program(build.call(aten.mul.Tensor, scaled, weight(build)))
    result = RmsNorm().run(program)
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program)


def test_a_factor_of_another_shape_is_no_weight(build):
    x = build.input("x", 2, WIDTH)
    scaled = build.call(aten.mul.Tensor, x, build.call(aten.rsqrt.default, mean_square(build, x)))
    program = build.program(build.call(aten.mul.Tensor, scaled, build.weight("w", torch.ones(2, WIDTH))))
    result = RmsNorm().run(program)
    (norm,) = result.program.nodes(torch.ops.moec.rms_norm.default)
    assert norm.args[1] is None
    assert len(result.program.nodes(aten.mul.Tensor)) == 1
    build.assert_same(program, result.program)


def another_axis(build, x):
    mean = build.call(aten.mean.dim, build.call(aten.square.default, x), [0], True)
    return build.call(aten.mul.Tensor, x, build.call(aten.rsqrt.default, mean))


def axis_not_kept(build, x):
    mean = build.call(aten.mean.dim, build.call(aten.square.default, x), [-1])
    return build.call(aten.mul.Tensor, x, build.call(aten.rsqrt.default, mean))


def epsilon_of_a_tensor(build, x):
    variance = mean_square(build, x, eps=build.input("eps", 1))
    return build.call(aten.mul.Tensor, x, build.call(aten.rsqrt.default, variance))


def another_tensor(build, x):
    return build.call(aten.mul.Tensor, build.input("y", 6, 6), build.call(aten.rsqrt.default, mean_square(build, x)))


def several_axes(build, x):
    return build.call(aten.rms_norm.default, x, [6, 6])


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (another_axis, "over the axes [0]"),
        (axis_not_kept, "with keepdim"),
        (epsilon_of_a_tensor, "epsilon is not a number"),
        (another_tensor, "scales %y by the mean square of %x"),
        (several_axes, "normalises 2 axes"),
    ],
)
def test_near_misses_are_left_with_the_reason(build, form, reason):
    assert_left_alone(RmsNorm(), build.program(form(build, build.input("x", 6, 6))), reason)


def test_other_norms_are_no_near_miss(build):
    x = build.input("x", 2, WIDTH)
    total = build.call(aten.sum.dim_IntList, build.call(aten.square.default, x), [-1], True)
    program = build.program(build.call(aten.mul.Tensor, x, build.call(aten.rsqrt.default, total)))
    result = RmsNorm().run(program)
    assert not result.modified
    assert result.rejections == ()
