"""The table of op cases: every op that has a rule or is a core op, with its edge cases. torch is the reference.

The interpreter and every target run all of it. A case is a function of `Axes`: `d.b` and `d.s` are sizes of tensors as
numbers, `d.batch` and `d.sequence` the same sizes as arguments. A mapping at the end holds keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.compiler.ir.ops import RMS_NORM, ROTARY, SELECT
from moec.compiler.ir.recurrences import CAUSAL_CONV, LINEAR_ATTENTION

aten = torch.ops.aten


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def positive(*shape: int) -> Tensor:
    return x(*shape).abs() + 0.1


def whole(*shape: int, low: int = -9, high: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def distinct(rows: int, count: int, below: int) -> Tensor:
    """Indices [rows, count] that are distinct within each row."""
    return torch.stack([torch.randperm(below, generator=torch.Generator().manual_seed(row)) for row in range(rows)])[
        :, :count
    ]


def flags(*shape: int, seed: int = 0) -> Tensor:
    return x(*shape, seed=seed) > 0


def _named(names: str) -> list[Any]:
    return [getattr(aten, name).default for name in names.split()]


# Op -> cases, one for each form of its arguments. `d` has the sizes as numbers (b, s) and as symbols.
UNARY = {
    op: [lambda d: (x(d.b, d.s, 8),)]
    for op in _named(
        "neg abs exp expm1 floor ceil sign cos sin tanh sigmoid relu silu square zeros_like ones_like log_sigmoid "
        "exp2 hardsigmoid hardswish hardtanh relu6 mish isnan isinf"
    )
}
POSITIVE = {op: [lambda d: (positive(d.b, d.s, 8),)] for op in _named("log log1p log2 log10 sqrt rsqrt reciprocal")}
TWO = {
    op: [lambda d: (x(d.b, d.s, 8), x(d.b, 1, 8, seed=1)), lambda d: (whole(d.b, d.s), x(d.b, d.s))]
    for op in (
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.rsub.Tensor,
    )
}
SCALAR = {
    op: [lambda d: (x(d.b, d.s), 1.5), lambda d: (whole(d.b, d.s), 3)]
    for op in (
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.rsub.Scalar,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.remainder.Scalar,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.floor_divide.Scalar,
    )
}
COMPARE_SCALAR = {
    op: [lambda d: (whole(d.b, d.s), 2), lambda d: (whole(d.b, d.s), 1.5), lambda d: (flags(d.b, d.s), 0)]
    for op in (aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar)
}
COMPARE = {
    op: [
        lambda d: (whole(d.b, d.s, low=0, high=3), whole(d.s, low=0, high=3, seed=1)),
        lambda d: (whole(d.b, d.s), x(d.b, 1)),
    ]
    for op in (aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor)
}
BITS = {
    op: [lambda d: (flags(d.b, d.s), flags(d.b, d.s, seed=1))]
    for op in (
        aten.logical_and.default,
        aten.logical_or.default,
        aten.logical_xor.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.bitwise_xor.Tensor,
    )
}
ELEMENTWISE = {
    **UNARY,
    **POSITIVE,
    **TWO,
    **SCALAR,
    **COMPARE_SCALAR,
    **COMPARE,
    **BITS,
    aten.add.Tensor: [*TWO[aten.add.Tensor], lambda d: (x(d.b, d.s), x(d.b, d.s, seed=1), {"alpha": 0.5})],
    aten.sub.Tensor: [*TWO[aten.sub.Tensor], lambda d: (x(d.b, d.s), x(d.b, d.s, seed=1), {"alpha": 2})],
    aten.rsub.Scalar: [*SCALAR[aten.rsub.Scalar], lambda d: (x(d.b, d.s), 1.5, 2)],
    aten.rsub.Tensor: [*TWO[aten.rsub.Tensor], lambda d: (x(d.b, d.s), x(d.s, seed=1), {"alpha": 0.5})],
    aten.logical_and.default: [*BITS[aten.logical_and.default], lambda d: (whole(d.b, d.s, low=0, high=2), flags(d.s))],
    aten.bitwise_not.default: [lambda d: (flags(d.b, d.s),)],
    aten.remainder.Tensor: [
        lambda d: (x(d.b, d.s), positive(d.b, d.s)),
        lambda d: (whole(d.b, d.s), whole(d.b, d.s, low=1, high=5)),
    ],
    aten.div.Scalar_mode: [lambda d: (whole(d.b, d.s), 4, {"rounding_mode": "floor"})],
    aten.leaky_relu.default: [lambda d: (x(d.b, d.s), 0.1)],
    aten.elu.default: [lambda d: (x(d.b, d.s), 0.5)],
    aten.lt.Scalar: [*COMPARE_SCALAR[aten.lt.Scalar], lambda d: (whole(d.b, d.s), 2**30)],
    aten.logical_not.default: [lambda d: (flags(d.b, d.s),), lambda d: (whole(d.b, d.s, low=0, high=2),)],
    # Halves are rounded to the even neighbour.
    aten.round.default: [lambda d: (whole(d.b, d.s) / 2,)],
    aten.div.Tensor_mode: [
        lambda d: (x(d.b, d.s), positive(d.b, d.s), {"rounding_mode": "floor"}),
        lambda d: (whole(d.b, d.s), whole(d.b, d.s, low=1, high=5), {"rounding_mode": "floor"}),
        lambda d: (whole(d.b, d.s), whole(d.b, d.s, low=1, high=5), {"rounding_mode": "trunc"}),
        lambda d: (x(d.b, d.s), positive(d.b, d.s), {"rounding_mode": "trunc"}),
        lambda d: (x(d.b, d.s), positive(d.b, d.s), {"rounding_mode": None}),
    ],
    aten.floor_divide.default: [
        lambda d: (whole(d.b, d.s), whole(d.b, d.s, low=1, high=5)),
        lambda d: (whole(d.b, d.s), 4),
        lambda d: (x(d.b, d.s), positive(d.b, d.s)),
    ],
    aten.pow.Tensor_Scalar: [
        lambda d: (x(d.b, d.s), 2),
        lambda d: (x(d.b, d.s), 3),
        lambda d: (positive(d.b, d.s), 0.5),
        lambda d: (positive(d.b, d.s), -1.5),
    ],
    aten.pow.Tensor_Tensor: [lambda d: (positive(d.b, d.s), x(d.b, d.s))],
    aten.pow.Scalar: [lambda d: (1.5, x(d.b, d.s))],
    aten.gelu.default: [lambda d: (x(d.b, d.s),), lambda d: (x(d.b, d.s), {"approximate": "tanh"})],
    # Above the threshold, softplus is the identity.
    aten.softplus.default: [
        lambda d: (x(d.b, d.s) * 30,),
        lambda d: (x(d.b, d.s), 2.0, 1.5),
        lambda d: (x(d.b, d.s), 0.5),
        lambda d: (x(d.b, d.s), 1, 0.5),
    ],
    aten.clamp.default: [
        lambda d: (x(d.b, d.s), -0.5, 0.5),
        lambda d: (x(d.b, d.s), None, 0.5),
        lambda d: (x(d.b, d.s), {"min": 0.1}),
        lambda d: (whole(d.b, d.s), 0),
    ],
    aten.clamp.Tensor: [
        lambda d: (x(d.b, d.s), -positive(d.b, d.s), positive(d.b, d.s)),
        lambda d: (x(d.b, d.s), None, positive(d.b, d.s)),
    ],
    aten.clamp_min.Tensor: [lambda d: (x(d.b, d.s), x(d.s, seed=1))],
    aten.clamp_max.Tensor: [lambda d: (x(d.b, d.s), x(d.s, seed=1))],
    aten.where.self: [lambda d: (flags(d.b, d.s), x(d.b, d.s), x(d.b, 1))],
    aten.where.ScalarOther: [lambda d: (flags(d.b, d.s), x(d.b, d.s), -1.0)],
    aten.where.ScalarSelf: [lambda d: (flags(d.b, d.s), 0.0, x(d.b, d.s))],
    aten.where.Scalar: [lambda d: (flags(d.b, d.s), 0.0, 1.0)],
    aten.masked_fill.Scalar: [lambda d: (x(d.b, d.s), flags(d.b, d.s), 0.0)],
    aten.masked_fill.Tensor: [lambda d: (x(d.b, d.s), flags(d.b, d.s), d.weight(torch.tensor(7.0)))],
    aten._to_copy.default: [
        lambda d: (whole(d.b, d.s), {"dtype": torch.float32}),
        lambda d: (x(d.b, d.s) * 3, {"dtype": torch.int64}),
        lambda d: (whole(d.b, d.s, low=0, high=2), {"dtype": torch.bool}),
    ],
    aten.full_like.default: [lambda d: (x(d.b, d.s), 2.5)],
}
SHAPE = {
    aten.view.default: [
        lambda d: (x(d.b, d.s, 8), [d.batch, d.sequence, 2, 4]),
        lambda d: (x(d.b, d.s, 8), [-1, 8]),
        lambda d: (x(d.b, d.s, 8), [d.batch, 8, d.sequence]),
    ],
    aten.reshape.default: [lambda d: (x(d.b, d.s, 8), [d.sequence, d.batch, 8])],
    aten._unsafe_view.default: [lambda d: (x(d.b, d.s, 8), [d.batch, d.sequence * 8])],
    aten.flatten.using_ints: [lambda d: (x(d.b, d.s, 2, 4), 2, 3)],
    aten.unflatten.int: [lambda d: (x(d.b, d.s, 8), -1, [2, 4])],
    aten.permute.default: [lambda d: (x(d.b, d.s, 8), [2, 0, -2])],
    aten.transpose.int: [lambda d: (x(d.b, d.s, 8), 1, -1)],
    aten.swapaxes.default: [lambda d: (x(d.b, d.s, 8), 0, -1)],
    aten.movedim.int: [lambda d: (x(d.b, d.s, 8), 0, 2)],
    aten.movedim.intlist: [lambda d: (x(d.b, d.s, 8), [0, 2], [1, 0])],
    aten.t.default: [lambda d: (x(d.b, d.s),), lambda d: (x(d.s),)],
    aten.unsqueeze.default: [lambda d: (x(d.b, d.s), -1), lambda d: (x(d.b, d.s), 0)],
    aten.squeeze.default: [lambda _: (x(3, 1, 2, 1),)],
    aten.squeeze.dim: [lambda d: (x(d.b, 1, d.s), 1), lambda d: (x(d.b, 3, d.s), 1)],
    aten.squeeze.dims: [lambda d: (x(d.b, 1, d.s, 1), [1, -1])],
    aten.expand.default: [
        lambda d: (x(d.b, 1, d.s), [-1, 4, -1]),
        lambda d: (x(1, d.s), [d.batch, d.sequence]),
        lambda d: (x(d.s), [3, d.batch, -1]),
        lambda d: (x(d.b, d.s), [-1, -1]),
    ],
    aten.expand_as.default: [lambda d: (x(d.s), x(d.b, d.s))],
    aten.broadcast_to.default: [lambda d: (x(d.s), [d.batch, d.sequence])],
    aten.narrow.default: [lambda d: (x(d.b, d.s, 8), 2, 3, 4)],
    aten.roll.default: [lambda d: (x(d.b, d.s, 8), [3], [2])],
    aten.slice.Tensor: [
        lambda d: (x(d.b, d.s, 8), 2, 2, 5),
        lambda d: (x(d.b, d.s, 8), -1, -3, 2**63 - 1),
        lambda d: (x(d.b, 8), 1, 0, d.sequence),
        lambda d: (x(d.b, d.s, 8), 2, 1, None, 3),
        lambda d: (x(d.b, d.s),),
    ],
    aten.select.int: [lambda d: (x(d.b, d.s, 8), 1, -1), lambda d: (x(d.b, d.s, 8), -1, 3)],
    aten.cat.default: [
        lambda d: ([x(d.b, d.s), x(d.b, 3)], 1),
        lambda d: ([x(d.b, d.s), whole(1, d.s)],),
        lambda d: ([x(d.b, d.s), x(d.b, d.s, seed=1)], -1),
    ],
    aten.concat.default: [lambda d: ([x(d.b, d.s), x(d.b, 3)], 1)],
    aten.stack.default: [lambda d: ([x(d.b, d.s), x(d.b, d.s, seed=1)], -1), lambda d: ([x(d.b), whole(d.b)],)],
    aten.slice_scatter.default: [
        lambda d: (x(d.b, 8), x(d.b, 3, seed=1), 1, 2, 5),
        lambda d: (x(d.b, 8), x(d.b, 6, seed=1), 1, 2),
        lambda d: (x(d.b, 8), x(d.b, 8, seed=1), 1),
        lambda d: (x(d.b, 8), x(d.b, 2, seed=1), -1, -3, -1),
    ],
    aten.select_scatter.default: [lambda d: (x(d.b, 8), x(d.b, seed=1), 1, -2)],
    aten.copy.default: [lambda d: (x(d.b, d.s), x(d.s, seed=1)), lambda d: (whole(d.b, d.s), x(d.b, d.s) * 5)],
    aten.repeat_interleave.self_int: [
        lambda d: (x(d.b, 3, d.s), 2, 1),
        lambda d: (x(d.b, d.s), 3, 0),
        lambda d: (x(d.b, d.s, 4), 2, -1),
    ],
    aten.repeat.default: [lambda d: (x(d.b, d.s), [2, 1, 3]), lambda d: (x(1, d.s), [d.batch, 1])],
    aten.embedding.default: [lambda d: (d.weight(x(16, 4)), whole(d.b, d.s, low=0, high=16))],
    aten.index_select.default: [lambda d: (x(d.b, 7, 4), 1, whole(d.s, low=0, high=7))],
    aten.index.Tensor: [
        lambda d: (x(16, 4), [whole(d.b, d.s, low=0, high=16)]),
        lambda d: (x(d.b, 16, 4), [None, whole(d.s, low=-16, high=16)]),
    ],
    aten.take_along_dim.default: [lambda d: (x(d.b, d.s, 8), whole(d.b, d.s, 3, low=0, high=8), -1)],
    aten.gather.default: [lambda d: (x(d.b, d.s, 8), -1, whole(d.b, d.s, 3, low=0, high=8))],
    aten.scatter.src: [
        lambda d: (x(d.b, 8), 1, distinct(d.b, 2, 8), x(d.b, 2, seed=1)),
        lambda d: (whole(d.b, 8), -1, distinct(d.b, 3, 8), whole(d.b, 3, seed=1)),
    ],
    aten.scatter.value: [lambda d: (x(d.b, 8), -1, distinct(d.b, 3, 8), 1.0)],
    aten.full.default: [
        lambda d: ([d.batch, 3], 2.5, {"dtype": torch.float32}),
        lambda d: ([d.batch], d.sequence, {"dtype": torch.int64}),
        lambda _: ([], float("-inf")),
    ],
    aten.new_full.default: [lambda d: (x(d.b), [d.batch, 2], 1.5)],
    aten.zeros.default: [lambda d: ([d.batch, d.sequence],)],
    aten.ones.default: [lambda d: ([d.sequence], {"dtype": torch.int64})],
    aten.new_zeros.default: [lambda d: (x(d.b), [d.batch, 2])],
    aten.new_ones.default: [lambda d: (x(d.b), [d.batch, 2])],
    aten.scalar_tensor.default: [lambda _: (3.5, {"dtype": torch.float32})],
    aten.arange.default: [lambda d: (d.sequence,), lambda _: (7, {"dtype": torch.float32})],
    aten.arange.start: [lambda d: (-2, d.sequence)],
    aten.arange.start_step: [lambda _: (1, 10, 3), lambda _: (0.0, 1.0, 0.25)],
    aten.pad.default: [lambda d: (x(d.b, d.s), [0, 1, 2, 0]), lambda d: (x(d.b, d.s), [1, 0], "constant", 2.0)],
    aten.constant_pad_nd.default: [
        lambda d: (x(d.b, d.s, 8), [1, 2]),
        lambda d: (x(d.b, d.s, 8), [0, 1, 2, 0], 7.0),
    ],
}
REDUCE = {
    **{
        op: [lambda d: (x(d.b, d.s, 8), [-1], True), lambda d: (x(d.b, d.s, 8), [1, 2]), lambda d: (x(d.b, d.s), [0])]
        for op in (
            aten.sum.dim_IntList,
            aten.mean.dim,
            aten.amax.default,
            aten.amin.default,
        )
    },
    **{
        op: [lambda d: (x(d.b, d.s),)]
        for op in (aten.sum.default, aten.mean.default, aten.max.default, aten.min.default)
    },
    **{
        op: [lambda d: (whole(d.b, d.s, 4, low=0, high=2), -1), lambda d: (flags(d.b, d.s), 1, True)]
        for op in (aten.any.dim, aten.all.dim)
    },
    **{
        op: [lambda d: (x(d.b, d.s, 8), -1), lambda d: (x(d.b, d.s, 8), 1, True), lambda d: (x(d.b, d.s),)]
        for op in (aten.argmax.default, aten.argmin.default)
    },
    aten.sum.dim_IntList: [
        lambda d: (x(d.b, d.s, 8), [-1], True),
        lambda d: (x(d.b, d.s, 8), None),
        lambda d: (flags(d.b, d.s), [-1]),
    ],
    **{op: [lambda d: (flags(d.b, d.s),)] for op in (aten.any.default, aten.all.default)},
    **{op: [lambda d: (flags(d.b, d.s, 4), [1, -1], True)] for op in (aten.any.dims, aten.all.dims)},
    aten.var.correction: [
        lambda d: (x(d.b, d.s, 8), [-1], {"correction": 0}),
        lambda d: (x(d.b, d.s, 8), [-1], {"correction": 1, "keepdim": True}),
    ],
    aten.logsumexp.default: [lambda d: (x(d.b, d.s, 8) * 30, [-1]), lambda d: (x(d.b, d.s, 8), [-1], True)],
    aten.argsort.default: [lambda d: (x(d.b, d.s, 8), -1, True)],
    aten._log_softmax.default: [lambda d: (x(d.b, d.s, 8), -1, False)],
    aten.softmax.int: [lambda d: (x(d.b, d.s, 8), -1, torch.float32), lambda d: (whole(d.b, d.s), 1, torch.float32)],
    aten._softmax.default: [lambda d: (x(d.b, d.s, 8), 1, False)],
    aten.log_softmax.int: [lambda d: (x(d.b, d.s, 8), -1)],
    aten.cumsum.default: [lambda d: (x(d.b, d.s), -1), lambda d: (flags(d.b, d.s), 0)],
    aten.norm.ScalarOpt_dim: [lambda d: (x(d.b, d.s, 8), 2, [-1], True), lambda d: (x(d.b, d.s, 8), 1, [1])],
    aten.linalg_vector_norm.default: [
        lambda d: (x(d.b, d.s, 8), 2, [-1], True),
        lambda d: (x(d.b, d.s),),
        lambda d: (x(d.b, d.s, 8), float("inf"), [-1]),
    ],
}
LINEAR = {
    aten.linear.default: [
        lambda d: (x(d.b, d.s, 8), d.weight(x(6, 8))),
        lambda d: (x(d.b, d.s, 8), d.weight(x(6, 8)), d.weight(x(6))),
        lambda d: (x(d.b, d.s, 8), x(6, 8)),
    ],
    aten.matmul.default: [
        lambda d: (x(d.b, d.s, 8), x(d.b, 8, 3)),
        lambda d: (x(d.b, 2, d.s, 8), x(8, 3)),
        lambda d: (x(d.b, 8), x(8)),
    ],
    aten.mv.default: [lambda d: (x(d.b, 8), x(8))],
    aten.mm.default: [lambda d: (x(d.b, 8), d.weight(x(8, 3)))],
    aten.bmm.default: [lambda d: (x(d.b, d.s, 8), x(d.b, 8, 3))],
    aten.baddbmm.default: [lambda d: (x(d.b, d.s, 3), x(d.b, d.s, 8), x(d.b, 8, 3), {"beta": 0.5, "alpha": 2})],
    aten.addmm.default: [
        lambda d: (x(3), x(d.b, 8), d.weight(x(8, 3))),
        lambda d: (x(3), x(d.b, 8), x(8, 3), {"beta": 0.5, "alpha": 2.0}),
    ],
}
CONVOLUTION = {
    aten.conv1d.default: [
        lambda d: (x(d.b, 6, d.s), d.weight(x(6, 1, 3)), None, [1], [2], [1], 6),
        lambda d: (x(d.b, 6, d.s), d.weight(x(6, 1, 3)), d.weight(x(6)), [1], [1], [1], 6),
        lambda d: (x(d.b, 6, d.s), d.weight(x(4, 3, 2)), None, [2], [1], [2], 2),
        lambda d: (x(d.b, 6, d.s), d.weight(x(5, 6, 1))),
    ],
}
NORM = {
    SELECT: [
        lambda d: (positive(d.b, 4), flags(d.b, 4), True),
        lambda d: (positive(d.b, 4), flags(1, 4), False),
        lambda d: (x(d.b, 3) * 0, flags(d.b, 3), True),
    ],
    RMS_NORM: [lambda d: (x(d.b, d.s, 8), d.weight(x(8)), 1e-3), lambda d: (x(d.b, d.s, 8), None, 1e-6)],
    aten.layer_norm.default: [
        lambda d: (x(d.b, d.s, 8), [8], d.weight(x(8)), d.weight(x(8, seed=1)), 1e-3),
        lambda d: (x(d.b, d.s, 8), [8], d.weight(x(8))),
        lambda d: (x(d.b, d.s, 8), [8]),
    ],
    ROTARY: [
        lambda d: (x(d.b, 2, d.s, 8), table(d.b, 1, d.s, 8, seed=1), table(d.b, 1, d.s, 8, seed=2)),
        lambda d: (x(d.b, 2, d.s, 8), table(1, 1, d.s, 8, seed=1), table(1, 1, d.s, 8, seed=2)),
        lambda d: (x(d.b, 2, d.s, 8), table(d.s, 8, seed=1), table(d.s, 8, seed=2)),
    ],
}


def scan(d: Any, rule: str, *, heads: tuple[int, int, int] = (2, 2, 4), per_key: bool = False) -> tuple[Any, ...]:
    """Arguments of a linear attention with Hq, Hk and H heads, keys of norm 1, and head sizes 8 (key) and 6 (value)."""
    queries, keys, own = heads
    key = torch.nn.functional.normalize(x(d.b, d.s, keys, 8, seed=1), dim=-1)
    decay = -positive(d.b, d.s, own, *((8,) if per_key else ())) if "gated" in rule else None
    beta = x(d.b, d.s, own, seed=3).sigmoid() if "delta" in rule else None
    return x(d.b, d.s, queries, 8), key, x(d.b, d.s, own, 6, seed=2), decay, beta, x(d.b, own, 8, 6), rule, 0.5


RECURRENCES: dict[Any, list[Callable[[Any], tuple[Any, ...]]]] = {
    LINEAR_ATTENTION: [
        lambda d: scan(d, "linear"),
        lambda d: scan(d, "gated"),
        lambda d: scan(d, "delta"),
        lambda d: scan(d, "gated_delta"),
        lambda d: scan(d, "gated_delta", per_key=True),
        lambda d: scan(d, "gated", heads=(1, 1, 6), per_key=True),
        lambda d: scan(d, "gated_delta", heads=(4, 2, 2)),
        lambda d: scan(d, "gated", heads=(4, 1, 4)),
    ],
    # The state holds as many inputs as the kernel needs or more, and a step may be shorter than the state.
    CAUSAL_CONV: [
        lambda d: (x(d.b, 6, d.s), d.weight(x(6, 1, 4)), d.weight(x(6)), x(d.b, 6, 4, seed=1), "silu"),
        lambda d: (x(d.b, 6, d.s), d.weight(x(6, 1, 3)), None, x(d.b, 6, 2, seed=1), "identity"),
    ],
}
SEVERAL = {
    **RECURRENCES,
    aten.topk.default: [lambda d: (x(d.b, d.s, 8), 3), lambda d: (x(d.b, 8), 2, 1, False, True)],
    aten.sort.default: [lambda d: (x(d.b, d.s, 8),), lambda d: (x(d.b, 8, d.s), 1, True)],
    aten.min.dim: [lambda d: (x(d.b, d.s, 8), -1), lambda d: (x(d.b, d.s, 8), 1, True)],
    aten.max.dim: [lambda d: (x(d.b, d.s, 8), -1), lambda d: (x(d.b, d.s, 8), 1, True)],
    aten.split.Tensor: [lambda d: (x(d.b, d.s, 8), 4, -1), lambda d: (x(d.b, 8), 3, 1)],
    aten.split_with_sizes.default: [lambda d: (x(d.b, d.s, 8), [2, 5, 1], -1)],
    aten.chunk.default: [lambda d: (x(d.b, d.s, 8), 2, 2)],
    aten.unbind.int: [lambda d: (x(d.b, 3, d.s), 1), lambda d: (x(3, d.b),)],
}
"""Ops with several results, the first two of which are compared."""


def table(*shape: int, seed: int) -> Tensor:
    """A rotary table with two equal halves."""
    half = x(*shape[:-1], shape[-1] // 2, seed=seed)
    return torch.cat([half, half], -1)


ONE: dict[Any, list[Callable[[Any], tuple[Any, ...]]]] = {
    **ELEMENTWISE,
    **SHAPE,
    **REDUCE,
    **LINEAR,
    **CONVOLUTION,
    **NORM,
}


def cases() -> list[Any]:
    """Op, arguments and index of the result to compare (None: it has a single one), as parameters of a test."""
    single = [(op, arguments, None, place) for op, forms in ONE.items() for place, arguments in enumerate(forms)]
    several = [
        (op, arguments, output, place)
        for op, forms in SEVERAL.items()
        for place, arguments in enumerate(forms)
        for output in (0, 1)
    ]
    return [
        pytest.param(op, arguments, output, id=f"{op}-{place}" + ("" if output is None else f"-{output}"))
        for op, arguments, output, place in (*single, *several)
    ]
