import pytest
import torch

from moec.compiler.ir.printing import format_graph
from moec.passes.canonical.slice_writes import SliceWrites

aten = torch.ops.aten
END = (1 << 63) - 1


def write(build, base, value, *bounds):
    target = build.call(aten.slice.Tensor, base, 1, *bounds)
    return build.call(aten.slice_scatter.default, base, build.call(aten.copy.default, target, value), 1, *bounds)


def test_slices_written_into_an_empty_tensor_are_joined(build, snapshot):
    x, y = build.input("x", 2, 3), build.input("y", 2, 5)
    empty = build.call(aten.new_empty.default, x, [2, 8])
    program = build.program(write(build, write(build, empty, y, 3, END), x, 0, 3))

    result = SliceWrites().run(program)

    assert result.modified
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program)


@pytest.mark.parametrize(
    ("bounds", "base", "reason"),
    [
        (((0, 3), (4, END)), "new_empty", "do not cover"),
        (((0, 4), (3, END)), "new_empty", "overlap"),
        (((0, 3), (3, END)), "new_zeros", "over another tensor"),
    ],
)
def test_other_writes_are_left_with_the_reason(build, bounds, base, reason):
    x = build.input("x", 2, 1)
    tensor = build.call(getattr(aten, base).default, x, [2, 8])
    for low, high in bounds:
        wide = build.call(aten.expand.default, x, [2, min(high, 8) - low])
        tensor = write(build, tensor, wide, low, high)
    program = build.program(tensor)
    result = SliceWrites().run(program)
    assert not result.modified
    assert result.program is program
    (rejection,) = result.rejections
    assert reason in rejection.reason


def test_a_slice_filled_by_broadcasting_is_left(build):
    x = build.input("x", 2, 1)
    empty = build.call(aten.new_empty.default, x, [2, 8])
    result = SliceWrites().run(build.program(write(build, empty, x, 0, END)))
    assert not result.modified
    assert "broadcasting" in result.rejections[0].reason
