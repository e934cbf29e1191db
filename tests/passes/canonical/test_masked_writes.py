import torch

from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.weights import Constant
from moec.passes.canonical.masked_writes import MaskedWrites

aten = torch.ops.aten


def test_interleaved_writes_become_choices(build, snapshot):
    """The rows of multimodal rotary tables: every third element from another row."""
    x, other = build.input("x", 3, 2, 4, 12), build.input("other", 2, 4, 12)
    row = build.call(aten.select.int, x, 0, 0)
    there = build.call(aten.slice.Tensor, row, 2, 1, 9, 3)
    here = build.call(aten.slice.Tensor, other, 2, 1, 9, 3)
    row = build.call(aten.slice_scatter.default, row, build.call(aten.copy.default, there, here), 2, 1, 9, 3)
    written = build.call(aten.select_scatter.default, x, row, 0, 0)
    outputs = [build.call(aten.select.int, written, 0, index) for index in (0, -3, 2)]
    program = build.program(build.call(aten.cat.default, outputs, 0))

    result = MaskedWrites().run(program)

    assert format_graph(result.program) == snapshot
    assert not result.program.nodes(aten.select_scatter.default)
    assert not result.program.nodes(aten.slice_scatter.default)
    build.assert_same(program, result.program)


def test_a_number_written_by_a_mask_is_a_fill(build):
    x = build.input("x", 2, 5)
    mask = build.call(aten.gt.Scalar, x, 0.0)
    program = build.program(build.call(aten.index_put.default, x, [mask], build.weight("seven", torch.tensor(7.0))))
    program = program.replace(weights=program.weights.with_tensors({"seven": Constant(torch.tensor(7.0))}))

    result = MaskedWrites().run(program)

    (fill,) = result.program.nodes(aten.masked_fill.Scalar)
    assert fill.args[2] == 7.0
    build.assert_same(program, result.program)


def test_other_elements_and_rows_chosen_by_number_stay(build):
    x, other, rows = build.input("x", 4, 12), build.input("other", 4, 12), build.input("rows", 3, dtype=torch.int64)
    moved = build.call(aten.slice.Tensor, other, 1, 2, 10, 3)
    y = build.call(aten.slice_scatter.default, x, moved, 1, 1, 9, 3)
    y = build.call(aten.index_put.default, y, [rows], build.weight("w", torch.ones(12)))
    assert not MaskedWrites().run(build.program(y)).modified
