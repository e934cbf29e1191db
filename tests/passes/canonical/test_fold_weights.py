from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.weights import LazyTensor
from moec.passes.canonical.fold_weights import FoldWeights

aten = torch.ops.aten


@dataclass(frozen=True)
class Recorded(LazyTensor):
    """A tensor that remembers which of its rows were read."""

    value: Tensor
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        self.reads.append((start, stop))
        return self.value[start:stop]


def stacked(build):
    """Three experts of width 4 for hidden size 2, stored as rows of matrices, as DBRX does."""
    w1, v1 = (Recorded(torch.randn(12, 2, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2))
    parts = [build.call(aten.view.default, build.weight(n, w), [3, 4, 2]) for n, w in (("w1", w1), ("v1", v1))]
    joined = build.call(aten.transpose.int, build.call(aten.cat.default, parts, 1), 1, 2)
    return w1, v1, joined


def test_computation_on_weights_becomes_a_weight(build, snapshot):
    x = build.input("x", 3, 5, 2)
    w1, _, joined = stacked(build)
    scale = build.call(aten.add.Tensor, build.weight("norm", torch.randn(8)), 1.0)
    steps = build.call(aten.arange.default, 8)
    y = build.call(aten.mul.Tensor, build.call(aten.matmul.default, x, joined), scale)
    program = build.program(build.call(aten.add.Tensor, y, steps))

    result = FoldWeights().run(program)

    assert result.modified
    assert w1.reads == []
    assert format_graph(result.program) == snapshot
    build.assert_same(program, result.program)


def test_one_expert_of_a_derived_stack_reads_one_expert(build):
    x = build.input("x", 3, 5, 2)
    w1, v1, joined = stacked(build)
    result = FoldWeights().run(build.program(build.call(aten.matmul.default, x, joined)))

    tensor = result.program.weights["block.transpose"]
    row = tensor.rows(1, 2)

    assert w1.reads == v1.reads == [(4, 8)]
    assert torch.equal(row, tensor.read()[1:2])
    assert torch.equal(row[0], torch.cat([w1.value[4:8], v1.value[4:8]]).T)


def test_names_do_not_clash(build):
    x = build.input("x", 2)
    first = build.call(aten.neg.default, build.weight("block.neg", torch.ones(2)))
    second = build.call(aten.neg.default, build.weight("b", torch.full((2,), 3.0)))
    program = build.program(build.call(aten.add.Tensor, build.call(aten.mul.Tensor, x, first), second))

    result = FoldWeights().run(program)

    assert {"block.neg", "block.neg_1", "block.neg_2"} <= set(result.program.weights)
    build.assert_same(program, result.program)


def test_slices_and_selections_of_weights(build):
    x = build.input("x", 2)
    source = Recorded(torch.arange(24.0).reshape(4, 3, 2))
    weight = build.weight("w", source)
    y = build.call(aten.select.int, build.call(aten.slice.Tensor, weight, 0, 1, 3), 0, -1)
    y = build.call(aten.slice.Tensor, y, 0, -1, (1 << 63) - 1)
    program = build.program(build.call(aten.add.Tensor, x, build.call(aten.squeeze.dim, y, 0)))

    result = FoldWeights().run(program)
    build.assert_same(program, result.program)

    source.reads.clear()
    result.program.weights.read("block.squeeze")
    assert source.reads == [(2, 3)]


def test_a_weight_that_would_grow_is_left_and_said_so(build):
    x = build.input("x", 200, 200)
    wide = build.call(aten.expand.default, build.weight("w", torch.ones(200)), [200, 200])
    result = FoldWeights().run(build.program(build.call(aten.add.Tensor, x, wide)))
    assert not result.modified
    (rejection,) = result.rejections
    assert rejection.where == "block"
    assert "800 into 160000 bytes" in rejection.reason


def test_randomness_and_inputs_are_not_folded(build):
    x = build.input("x", 2)
    noise = build.call(aten.rand_like.default, build.weight("w", torch.ones(2)))
    program = build.program(build.call(aten.add.Tensor, x, noise))
    result = FoldWeights().run(program)
    assert not result.modified
    assert result.program is program
