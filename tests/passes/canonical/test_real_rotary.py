import pytest
import torch

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.ir.printing import format_graph
from moec.passes.canonical.real_rotary import RealRotary

aten = torch.ops.aten


def complex_rotation(build, radius=None):
    x, angle = build.input("x", 2, 4, 5, 6), build.input("angle", 2, 5, 3)
    radius = build.call(aten.ones_like.default, angle) if radius is None else radius(angle)
    polar = build.call(aten.unsqueeze.default, build.call(aten.polar.default, radius, angle), 1)
    pairs = build.call(aten.view_as_complex.default, build.call(aten.reshape.default, x, [2, 4, 5, 3, 2]))
    turned = build.call(aten.view_as_real.default, build.call(aten.mul.Tensor, pairs, polar))
    return build.call(aten.reshape.default, turned, [2, 4, 5, 6])


def test_a_complex_rotation_becomes_real(build, snapshot):
    program = build.program(complex_rotation(build))

    result = RealRotary().run(program)

    assert result.modified
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program)


def test_radii_and_real_factors(build):
    y = complex_rotation(build, radius=lambda angle: build.call(aten.exp.default, angle))
    z = build.call(aten.complex.default, y, y)
    scaled = build.call(aten.mul.Tensor, z, y)
    parts = [build.call(getattr(aten, name).default, scaled) for name in ("real", "imag")]
    program = build.program(build.call(aten.cat.default, parts, -1))
    result = RealRotary().run(program)
    assert "c64" not in format_graph(result.program)
    build.assert_same(program, result.program)


def test_real_graphs_are_left_alone(build):
    program = build.program(build.call(aten.cos.default, build.input("x", 2)))
    result = RealRotary().run(program)
    assert not result.modified
    assert result.program is program


def test_an_unknown_complex_op_is_named(build):
    x = build.input("x", 2, 3)
    z = build.call(aten.exp.default, build.call(aten.complex.default, x, x))
    program = build.program(build.call(aten.real.default, z))
    with pytest.raises(UnsupportedModelError, match=r"block: aten\.exp\.default on complex tensors"):
        RealRotary().run(program)
