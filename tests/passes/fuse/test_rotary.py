import operator

import pytest
import torch

from moec.compiler.ir.printing import format_graph
from moec.passes.fuse.rotary import Rotary
from tests.support.checks import assert_left_alone

aten = torch.ops.aten
END = (1 << 63) - 1
BATCH, HEADS, LENGTH, WIDTH = 2, 3, 5, 8
HALF = WIDTH // 2


def tables(build, double, axis=1, scale=None):
    """Cosines and sines of an input of angles, doubled by `double`."""
    angles = double(build.input("angles", BATCH, LENGTH, HALF))
    found = []
    for target in (aten.cos.default, aten.sin.default):
        table = build.call(target, angles)
        table = table if scale is None else build.call(aten.mul.Tensor, table, scale)
        found.append(build.call(aten.unsqueeze.default, table, axis))
    return found


def halves(build):
    return lambda angles: build.call(aten.cat.default, [angles, angles], -1)


def pairs(build):
    return lambda angles: build.call(aten.repeat_interleave.self_int, angles, 2, -1)


def cut(build, x, *bounds):
    return build.call(aten.slice.Tensor, x, 3, *bounds)


def whole(build, x, rotated, cos, sin):
    straight = build.call(aten.mul.Tensor, cos, x)
    return build.call(aten.add.Tensor, build.call(aten.mul.Tensor, rotated, sin), straight)


def llama(build, x):
    rotated = [build.call(aten.neg.default, cut(build, x, HALF, END)), cut(build, x, 0, HALF)]
    return whole(build, x, build.call(aten.cat.default, rotated, -1), *tables(build, halves(build), scale=1.5))


def interleaved(build, x):
    rotated = [build.call(aten.neg.default, cut(build, x, 1, END, 2)), cut(build, x, 0, END, 2)]
    stack = build.call(aten.stack.default, rotated, -1)
    return whole(
        build, x, build.call(aten.reshape.default, stack, list(x.meta["val"].shape)), *tables(build, pairs(build))
    )


def written_out(build, first, second, cos, sin):
    def times(a, b):
        return build.call(aten.mul.Tensor, a, b)

    low = build.call(aten.sub.Tensor, times(first, cos), times(second, sin))
    return low, build.call(aten.add.Tensor, times(first, sin), times(cos, second))


def split(build, x):
    both = build.call(aten.split.Tensor, x, HALF, -1)
    parts = [build.call(operator.getitem, both, index) for index in (0, 1)]
    return build.call(aten.cat.default, list(written_out(build, *parts, *tables(build, lambda angles: angles))), -1)


def even_odd_to_halves(build, x):
    parts = [cut(build, x, start, END, 2) for start in (0, 1)]
    return build.call(aten.cat.default, list(written_out(build, *parts, *tables(build, lambda angles: angles))), -1)


def selected_pairs(build, x):
    paired = build.call(aten.reshape.default, x, [BATCH, HEADS, LENGTH, HALF, 2])
    parts = [build.call(aten.select.int, paired, -1, index) for index in (0, 1)]
    stack = build.call(aten.stack.default, list(written_out(build, *parts, *tables(build, lambda angles: angles))), -1)
    return build.call(aten.reshape.default, stack, [BATCH, HEADS, LENGTH, WIDTH])


FORMS = [llama, interleaved, split, even_odd_to_halves, selected_pairs]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_one_op(build, form, snapshot):
    program = build.program(form(build, build.input("x", BATCH, HEADS, LENGTH, WIDTH)))

    result = Rotary().run(program)

    assert result.modified
    assert len(result.program.nodes(torch.ops.moec.rotary.default)) == 1
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program)


def test_heads_after_positions_are_transposed(build, snapshot):
    x = build.input("x", BATCH, LENGTH, HEADS, WIDTH)
    rotated = [build.call(aten.neg.default, cut(build, x, HALF, END)), cut(build, x, 0, HALF)]
    cos, sin = tables(build, halves(build), axis=2)
    program = build.program(whole(build, x, build.call(aten.cat.default, rotated, -1), cos, sin))
    result = Rotary().run(program)
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program)


def test_a_partial_rotation_is_one_of_a_slice(build):
    x = build.input("x", BATCH, HEADS, LENGTH, WIDTH + 4)
    turned = llama(build, cut(build, x, 0, WIDTH))
    program = build.program(build.call(aten.cat.default, [turned, cut(build, x, WIDTH, END)], -1))
    result = Rotary().run(program)
    assert len(result.program.nodes(torch.ops.moec.rotary.default)) == 1
    build.assert_same(program, result.program)


def unequal_halves(build, x):
    rotated = [build.call(aten.neg.default, cut(build, x, 3, END)), cut(build, x, 0, 3)]
    return whole(build, x, build.call(aten.cat.default, rotated, -1), *tables(build, halves(build)))


def wrong_order(build, x):
    rotated = [build.call(aten.neg.default, cut(build, x, 0, HALF)), cut(build, x, HALF, END)]
    return whole(build, x, build.call(aten.cat.default, rotated, -1), *tables(build, halves(build)))


def tables_of_any_kind(build, x):
    rotated = [build.call(aten.neg.default, cut(build, x, HALF, END)), cut(build, x, 0, HALF)]
    cos, sin = (build.input(name, BATCH, 1, LENGTH, WIDTH) for name in ("cos", "sin"))
    return whole(build, x, build.call(aten.cat.default, rotated, -1), cos, sin)


def halves_where_pairs_belong(build, x):
    rotated = [build.call(aten.neg.default, cut(build, x, 1, END, 2)), cut(build, x, 0, END, 2)]
    stack = build.call(aten.stack.default, rotated, -1)
    turned = build.call(aten.reshape.default, stack, list(x.meta["val"].shape))
    return whole(build, x, turned, *tables(build, halves(build)))


def another_input(build, x):
    rotated = [build.call(aten.neg.default, cut(build, x, HALF, END)), cut(build, x, 0, HALF)]
    other = build.input("y", BATCH, HEADS, LENGTH, WIDTH)
    return whole(build, other, build.call(aten.cat.default, rotated, -1), *tables(build, halves(build)))


def tables_for_heads(build, x):
    rotated = [build.call(aten.neg.default, cut(build, x, HALF, END)), cut(build, x, 0, HALF)]
    cos, sin = (
        build.call(aten.expand.default, table, [BATCH, HEADS, LENGTH, WIDTH]) for table in tables(build, halves(build))
    )
    return whole(build, x, build.call(aten.cat.default, rotated, -1), cos, sin)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (unequal_halves, "parts of its input have different widths: 3 and 5"),
        (wrong_order, "not a rotation"),
        (tables_of_any_kind, "halves of its tables may differ"),
        (halves_where_pairs_belong, "equal pairs"),
        (another_input, "not the same input times a table"),
        (tables_for_heads, "halves of its tables may differ"),
    ],
)
def test_near_misses_are_left_with_the_reason(build, form, reason):
    assert_left_alone(Rotary(), build.program(form(build, build.input("x", BATCH, HEADS, LENGTH, WIDTH))), reason)


def test_tables_of_another_dtype(build):
    x = build.input("x", BATCH, HEADS, LENGTH, WIDTH, dtype=torch.float16)
    result = Rotary().run(build.program(llama(build, x)))
    assert not result.modified
    assert "its tables are torch.float32" in result.rejections[0].reason


def test_joining_negated_parts_is_no_near_miss(build):
    x = build.input("x", BATCH, HEADS, LENGTH, WIDTH)
    parts = [build.call(aten.neg.default, cut(build, x, 0, 2)), cut(build, x, 2, END)]
    result = Rotary().run(build.program(build.call(aten.cat.default, parts, -1)))
    assert not result.modified
    assert result.rejections == ()


def test_halves_of_the_tables_that_differ(build):
    def double(angles):
        return build.call(aten.cat.default, [angles, build.call(aten.neg.default, angles)], -1)

    x = build.input("x", BATCH, HEADS, LENGTH, WIDTH)
    rotated = [build.call(aten.neg.default, cut(build, x, HALF, END)), cut(build, x, 0, HALF)]
    turned = build.call(aten.cat.default, rotated, -1)
    result = Rotary().run(build.program(whole(build, x, turned, *tables(build, double))))
    assert not result.modified
    assert "may differ" in result.rejections[0].reason


def test_a_shear_is_no_rotation(build):
    x = build.input("x", BATCH, HEADS, LENGTH, WIDTH)
    first, second = cut(build, x, 0, HALF), cut(build, x, HALF, END)
    cos, sin = tables(build, lambda angles: angles)
    low, _ = written_out(build, first, second, cos, sin)
    # Cosine and sine in the second part are the wrong way round.
    _, high = written_out(build, first, second, sin, cos)
    program = build.program(build.call(aten.cat.default, [low, high], -1))
    assert not Rotary().run(program).modified
