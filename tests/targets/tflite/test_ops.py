"""Every op of the lowering table, alone, against torch."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moec.compiler.common.errors import LoweringError
from moec.compiler.ir.ops import ATTENTION_KINDS
from moec.compiler.ir.program import ATTENTION, EXPERTS, RMS_NORM, ROTARY, SELECT
from moec.compiler.ir.weights import Constant
from moec.targets.tflite.lowerings.table import TABLE

aten = torch.ops.aten


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def whole(*shape: int, low: int = -9, high: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def flags(*shape: int, seed: int = 0) -> Tensor:
    return x(*shape, seed=seed) > 0


def distinct(rows: int, count: int, below: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.stack([torch.randperm(below, generator=generator)[:count] for _ in range(rows)])


UNARY = [
    (op, x(2, 3, 8))
    for op in (
        aten.neg.default,
        aten.abs.default,
        aten.exp.default,
        aten.expm1.default,
        aten.floor.default,
        aten.ceil.default,
        aten.round.default,
        aten.sign.default,
        aten.cos.default,
        aten.sin.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.relu.default,
        aten.silu.default,
        aten.gelu.default,
        aten.softplus.default,
        aten.square.default,
        aten.reciprocal.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
        aten.zeros_like.default,
        aten.ones_like.default,
    )
]
POSITIVE = [(op, x(2, 8).abs() + 0.1) for op in (aten.log.default, aten.log1p.default, aten.sqrt.default)]
BINARY = [
    (op, x(2, 3, 8), x(3, 8, seed=1))
    for op in (
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.rsub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.lt.Tensor,
        aten.le.Tensor,
        aten.gt.Tensor,
        aten.ge.Tensor,
    )
]
SCALAR = [
    (op, x(2, 8), 1.5)
    for op in (
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.rsub.Scalar,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.lt.Scalar,
        aten.le.Scalar,
        aten.gt.Scalar,
        aten.ge.Scalar,
        aten.clamp_min.default,
        aten.clamp_max.default,
    )
]
OTHER_ELEMENTWISE: list[tuple[Any, ...]] = [
    (aten.softplus.default, 60 * x(2, 8)),
    (aten.gelu.default, x(2, 8), {"approximate": "tanh"}),
    (aten.add.Tensor, x(2, 8), x(2, 8, seed=1), {"alpha": 2}),
    (aten.add.Tensor, whole(2, 8), 3),
    (aten.rsqrt.default, x(2, 8).abs() + 0.1),
    (aten.div.Tensor, whole(2, 8), 4),
    (aten.div.Tensor_mode, whole(2, 8), 4, {"rounding_mode": "floor"}),
    (aten.div.Tensor_mode, whole(2, 8), 4, {"rounding_mode": "trunc"}),
    (aten.div.Tensor_mode, x(2, 8), 0.7, {"rounding_mode": "floor"}),
    (aten.floor_divide.default, whole(2, 8), 4),
    (aten.remainder.Scalar, whole(2, 8), 4),
    (aten.pow.Tensor_Scalar, x(2, 8), 2),
    (aten.pow.Tensor_Scalar, x(2, 8).abs(), 0.5),
    (aten.pow.Tensor_Scalar, x(2, 8).abs() + 0.1, 1.7),
    (aten.pow.Tensor_Tensor, x(2, 8).abs() + 0.1, x(2, 8, seed=1)),
    (aten.pow.Scalar, 2.0, x(2, 8)),
    (aten.eq.Tensor, whole(2, 8), whole(2, 8, seed=1)),
    (aten.eq.Scalar, whole(2, 8), 3),
    (aten.ne.Tensor, flags(2, 8), flags(2, 8, seed=1)),
    (aten.ne.Scalar, whole(2, 8), 3),
    (aten.lt.Scalar, whole(2, 8), 1.5),
    (aten.lt.Scalar, whole(2, 8), 2**62),
    (aten.logical_and.default, flags(2, 8), flags(2, 8, seed=1)),
    (aten.logical_or.default, flags(2, 8), flags(2, 8, seed=1)),
    (aten.logical_not.default, whole(2, 8, low=-1, high=2)),
    (aten.bitwise_and.Tensor, flags(2, 8), flags(2, 8, seed=1)),
    (aten.bitwise_or.Tensor, flags(2, 8), flags(2, 8, seed=1)),
    (aten.bitwise_not.default, flags(2, 8)),
    (aten.clamp.default, x(2, 8), -0.5, 0.5),
    (aten.clamp.default, x(2, 8), None, 0.5),
    (aten.clamp.Tensor, x(2, 8), -x(8).abs(), x(8).abs()),
    (aten.where.self, flags(2, 8), x(2, 8), x(8, seed=1)),
    (aten.where.ScalarOther, flags(2, 8), x(2, 8), 0.5),
    (aten.where.ScalarSelf, flags(2, 8), 0.5, x(2, 8)),
    (aten.where.Scalar, flags(2, 8), 0.5, 1.5),
    (aten.masked_fill.Scalar, x(2, 8), flags(2, 8), -1.0),
    (aten.masked_fill.Tensor, x(2, 8), flags(8), torch.tensor(2.0)),
    (aten._to_copy.default, 3 * x(2, 8), {"dtype": torch.int64}),
    (aten._to_copy.default, flags(2, 8), {"dtype": torch.float32}),
    (aten.to.dtype, whole(2, 8), torch.float32),
    (aten.type_as.default, whole(2, 8), x(1)),
    (aten.dropout.default, x(2, 8), 0.5, False),
    (aten.full_like.default, x(2, 8), 3.0),
]
SHAPES: list[tuple[Any, ...]] = [
    (aten.view.default, x(2, 3, 8), [6, 8]),
    (aten.reshape.default, x(2, 3, 8), [2, -1]),
    (aten._unsafe_view.default, x(2, 3, 8), [3, 16]),
    (aten.flatten.using_ints, x(2, 3, 8), 0, 1),
    (aten.unflatten.int, x(2, 6), 1, [2, 3]),
    (aten.unsqueeze.default, x(2, 3), 1),
    (aten.squeeze.default, x(2, 1, 3)),
    (aten.squeeze.dim, x(2, 1, 3), 1),
    (aten.squeeze.dims, x(1, 2, 1, 3), [0, 2]),
    (aten.permute.default, x(2, 3, 4, 5), [2, 0, 3, 1]),
    (aten.transpose.int, x(2, 3, 4), 1, -1),
    (aten.transpose.int, x(2, 1, 4), 1, 2),
    (aten.t.default, x(2, 3)),
    (aten.expand.default, x(2, 1, 3), [2, 4, -1]),
    (aten.expand.default, x(3), [2, 3]),
    (aten.slice.Tensor, x(2, 9), 1, 2, 7),
    (aten.slice.Tensor, x(2, 9), 1, -4, 2**63 - 1),
    (aten.slice.Tensor, x(2, 9), 1, 1, 9, 3),
    (aten.select.int, x(2, 3, 4), 1, -1),
    (aten.cat.default, [x(2, 3), x(2, 4)], 1),
    (aten.cat.default, [x(2, 3), x(2, 0), x(2, 4)], -1),
    (aten.concat.default, [x(2, 3), x(4, 3)]),
    (aten.stack.default, [x(2, 3), x(2, 3, seed=1)], -1),
    (aten.split.Tensor, x(2, 7), 3, 1),
    (aten.split_with_sizes.default, x(2, 8), [3, 5], 1),
    (aten.chunk.default, x(2, 8), 2, -1),
    (aten.unbind.int, x(2, 3, 4), 1),
    (aten.slice_scatter.default, x(2, 8), x(2, 3), 1, 2, 5),
    (aten.slice_scatter.default, x(2, 8), x(2, 5), 1, 0, 5),
    (aten.copy.default, x(2, 8), x(8)),
    (aten.repeat_interleave.self_int, x(2, 3, 4), 2, 1),
    (aten.repeat.default, x(2, 3), [2, 1, 3]),
    (aten.constant_pad_nd.default, x(2, 3), [1, 2], 0.5),
    (aten.pad.default, x(2, 3), [0, 1, 2, 0]),
    (aten.index_select.default, x(4, 3), 0, torch.tensor([2, 0])),
    (aten.index.Tensor, x(4, 3), [None, torch.tensor([2, 0])]),
    (aten.gather.default, x(3, 6), 1, distinct(3, 2, 6)),
    (aten.scatter.value, x(3, 6), 1, distinct(3, 2, 6), 1.0),
    (aten.scatter.src, x(3, 6), -1, distinct(3, 2, 6), x(3, 2)),
    (aten.scatter.src, whole(3, 6), -1, distinct(3, 2, 6), whole(3, 2)),
    (aten.full.default, [2, 3], 1.5),
    (aten.zeros.default, [2, 3]),
    (aten.ones.default, [2, 3]),
    (aten.new_zeros.default, x(1), [2, 3]),
    (aten.new_ones.default, x(1), [2, 3]),
    (aten.embedding.default, x(9, 4), whole(2, 3, low=0)),
]
REDUCTIONS: list[tuple[Any, ...]] = [
    (aten.sum.dim_IntList, x(2, 3, 4), [1], True),
    (aten.sum.default, x(2, 3)),
    (aten.mean.dim, x(2, 3, 4), [0, -1]),
    (aten.mean.default, x(2, 3)),
    (aten.amax.default, x(2, 3, 4), [-1], True),
    (aten.amin.default, x(2, 3, 4), [1]),
    (aten.any.dim, flags(3, 4), 1),
    (aten.all.dim, flags(3, 4), 1, True),
    (aten.argmax.default, x(3, 4), 1),
    (aten.argmax.default, torch.tensor([[1.0, 3.0, 3.0]]), 1, True),
    (aten.argmin.default, x(3, 4), 0, True),
    (aten.max.dim, x(3, 4), 1, True),
    (aten.softmax.int, x(2, 3, 4), 1),
    (aten._softmax.default, x(2, 3), -1, False),
    (aten.log_softmax.int, x(2, 3), -1),
    (aten.topk.default, x(2, 9), 3),
    (aten.topk.default, x(9, 2), 3, 0),
    (aten.topk.default, x(2, 9), 3, -1, False),
    (aten.sort.default, x(2, 9)),
    (aten.sort.default, x(2, 9), -1, True),
    (aten.cumsum.default, x(2, 9), -1),
    (aten.norm.ScalarOpt_dim, x(2, 9), 2, [-1], True),
    (aten.linalg_vector_norm.default, x(2, 9), 1, [-1]),
]
PRODUCTS: list[tuple[Any, ...]] = [
    (aten.linear.default, x(2, 3, 8), x(5, 8)),
    (aten.linear.default, x(3, 8), x(5, 8), x(5)),
    (aten.matmul.default, x(2, 3, 8), x(8, 5)),
    (aten.matmul.default, x(3, 8), x(8)),
    (aten.mm.default, x(3, 8), x(8, 5)),
    (aten.bmm.default, x(2, 3, 8), x(2, 8, 5)),
    (aten.addmm.default, x(5), x(3, 8), x(8, 5)),
    (aten.conv1d.default, x(2, 6, 11), x(6, 1, 3), None, [1], [2], [1], 6),
    (aten.conv1d.default, x(1, 6, 11), Constant(x(12, 1, 3)), x(12), [2], [0], [3], 6),
    (aten.conv1d.default, x(2, 6, 11), x(5, 6, 4), x(5), [3], [1], [2]),
    (aten.conv1d.default, x(1, 6, 11), Constant(x(5, 6, 4))),
    (RMS_NORM, x(2, 3, 8), x(8), 1e-5),
    (RMS_NORM, x(2, 3, 8), None, 1e-5),
    (ROTARY, x(1, 4, 3, 8), x(1, 1, 3, 8), x(1, 1, 3, 8, seed=1)),
    (aten.layer_norm.default, x(2, 8), [8], x(8), x(8, seed=1), 1e-5),
    (aten.layer_norm.default, x(2, 8), [8]),
    (SELECT, x(3, 4).abs(), flags(3, 4), True),
    (SELECT, x(3, 4).abs(), flags(1, 4), False),
    (SELECT, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]), torch.zeros(2, 3, dtype=torch.bool), True),
]
CASES = [*UNARY, *POSITIVE, *BINARY, *SCALAR, *OTHER_ELEMENTWISE, *SHAPES, *REDUCTIONS, *PRODUCTS]
UNSPECIFIED = {aten.empty.memory_format, aten.new_empty.default}
"""What these hold is anybody's guess, torch's included."""


def expected(case: tuple[Any, ...]) -> list[np.ndarray]:
    target, *arguments = case
    kwargs = arguments.pop() if isinstance(arguments[-1], dict) else {}
    result = target(*(item.read() if isinstance(item, Constant) else item for item in arguments), **kwargs)
    return [value.numpy() for value in pytree.tree_leaves(result)]


def test_every_op_gives_what_torch_gives(build: Any) -> None:
    found = build.calls({f"case{index}": case for index, case in enumerate(CASES)})
    wrong = []
    for index, case in enumerate(CASES):
        got, want = found[f"case{index}"], expected(case)
        alike = len(got) == len(want) and all(
            mine.shape == theirs.shape and np.allclose(mine, theirs, rtol=2e-6, atol=2e-6)
            for mine, theirs in zip(got, want, strict=False)
        )
        if not alike:
            wrong.append((str(case[0]), case[1:], got, want))
    assert not wrong


def test_the_cases_cover_the_table() -> None:
    elsewhere = {ATTENTION, EXPERTS, operator.getitem, *UNSPECIFIED}
    assert {case[0] for case in CASES} | elsewhere == set(TABLE)


@pytest.mark.parametrize(
    "case",
    [
        (aten.div.Tensor_mode, x(2, 8), 2.0, {"rounding_mode": "trunc"}),
        (aten.bitwise_and.Tensor, whole(2, 8), whole(2, 8)),
        (aten.softplus.default, x(2, 8), 2),
        (aten.gather.default, x(3, 6), 0, distinct(1, 2, 3)),
        (aten.scatter.value, x(3, 6), 0, distinct(1, 2, 3), 1.0),
        (aten.argmax.default, x(2, 3)),
        (aten.layer_norm.default, x(2, 3, 8), [3, 8]),
        (aten.linalg_vector_norm.default, x(2, 9), 3, [-1]),
        (aten.slice_scatter.default, x(2, 8), x(2, 4), 1, 0, 8, 2),
        (aten.constant_pad_nd.default, x(2, 3), [-1, 0]),
        (aten.addmm.default, x(5), x(3, 8), x(8, 5), {"beta": 2}),
        (aten.conv1d.default, x(1, 6, 9), x(6, 3, 2), None, [1], [0], [1], 2),
        (aten.erf.default, x(2)),
    ],
    ids=lambda case: str(case[0]),
)
def test_what_has_no_form_is_refused(build: Any, case: tuple[Any, ...]) -> None:
    with pytest.raises(LoweringError, match=r"ha(s|ve) no form|no lowering"):
        build.calls({"case": case})


def attention(kind: str, length: int, *, sinks: bool = False, softcap: float = 0.0, first: int = 9) -> tuple[Any, ...]:
    """A call on a cache of 24 slots of which `first` hold tokens, and garbage lies behind them."""
    heads, groups, depth, width, capacity = 4, 2, 8, 6, 24
    position = torch.arange(first, first + length)
    return (
        ATTENTION,
        x(1, heads, length, depth),
        x(1, groups, length, depth, seed=1),
        x(1, groups, length, width, seed=2),
        x(1, groups, capacity, depth, seed=3),
        x(1, groups, capacity, width, seed=4),
        position,
        None,
        x(heads) if sinks else None,
        0.35,
        kind,
        0 if kind == "causal" else 5,
        softcap,
    )


def test_attention_sees_the_slots_that_hold_tokens_and_nothing_behind(build: Any) -> None:
    cases = {f"{kind}_{length}": attention(kind, length) for kind in ATTENTION_KINDS for length in (1, 3)}
    cases |= {"sinks": attention("sliding", 3, sinks=True), "softcap": attention("causal", 3, softcap=2.0)}
    cases["first"] = attention("causal", 3, first=0)
    # The trace has a past of capacity - length slots, the file one of `capacity`: hence the shapes of the fake call.
    results = build.calls(cases, capacity=24)
    for name, case in cases.items():
        target, *arguments = case
        first, length = int(arguments[5][0]), arguments[5].numel()
        grown = [*arguments]
        grown[3], grown[4] = (cache[:, :, :first] for cache in arguments[3:5])
        out, keys, values = target(*grown)
        np.testing.assert_allclose(results[name][0], out, atol=2e-6, err_msg=name)
        for got, new, old in zip(results[name][1:], (keys, values), arguments[3:5], strict=True):
            np.testing.assert_array_equal(got[:, :, : first + length], new)
            np.testing.assert_array_equal(got[:, :, first + length :], old[:, :, first + length :])
