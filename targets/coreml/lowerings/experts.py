"""`moec::experts` and `moec::select`.

Decode wraps each expert in a `cond`, so that experts of weight 0 are not executed. Prefill computes every expert for
every token and masks the results of weight 0: with many tokens, nearly every expert is needed by some token, and the
GPU and the Neural Engine run a graph without branches best. Both functions share the stored weights.

Names are short, since each occurs several times in the graph. For expert 3 of MoE layer 1 (counted from 0), `w1_3_up`
and `w1_3_down` are the weights, `b1_3_up` and `b1_3_down` the biases, `moe1_3_up` and `moe1_3_down` the products, and
`moe1_3` is the result of the `cond`. `up` includes the gate of gated experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.experts import Gate
from moec.compiler.ir.operands import Experts, Select
from moec.compiler.ir.program import EXPERTS, SELECT
from moec.targets.common.arguments import result_dtype
from moec.targets.common.gate import gated
from moec.targets.common.refusals import refuse
from moec.targets.coreml.context import MIL_NAMES, NUMPY, Context, Var
from moec.targets.coreml.lowerings.elementwise import Lowering
from moec.targets.coreml.lowerings.shape import cut
from moec.targets.coreml.package import EXPERT_SCOPE

_GELU = {"gelu": "EXACT", "gelu_tanh": "TANH_APPROXIMATION"}


def dense_weights(ctx: Context, node: fx.Node) -> Var:
    """Routing weights as [T, E] float32: 0 for every expert that was not selected for a token."""
    own, mb = Experts.of(node), ctx.mb
    experts = ctx.constant(np.arange(own.num_experts, dtype=np.int32)[None, None])
    picked = mb.expand_dims(x=ctx.tensor(own.indices, torch.int32), axes=ctx.ints(2))
    hot = ctx.cast(mb.equal(x=picked, y=experts), "fp32")
    spread = mb.mul(x=hot, y=mb.expand_dims(x=ctx.tensor(own.weights, torch.float32), axes=ctx.ints(2)))
    return mb.reduce_sum(x=spread, axes=ctx.ints(1), keep_dims=ctx.constant(False))


def _experts(ctx: Context, node: fx.Node) -> Var:
    own, dtype = Experts.of(node), result_dtype(node)
    if not all(stack.op == "get_attr" for stack in own.stacks.values()):
        raise refuse(node, "expert weights that are computed in the graph are not supported", "run the common passes")
    x, dense = ctx.tensor(own.hidden_states, dtype), dense_weights(ctx, node)
    number = ctx.shared("experts layers", lambda: [0])
    # Made outside, so that all branches share these constants; each branch would make its own.
    for shared in (2, len(x.shape) - 1):
        ctx.constant(np.int32(shared))
    ctx.text("fp32")
    for weight, bias in ((own.gate_up_proj, own.gate_up_bias), (own.down_proj, own.down_bias)):
        if bias is None:
            ctx.zeros(int(weight.meta["val"].shape[1]), dtype)
    expert = partial(_expert, ctx, node, x, number[0])
    layer = Layer(dense, own.num_experts, x, f"{EXPERT_SCOPE}{number[0]}", expert)
    number[0] += 1
    if not ctx.settings.skip_experts:
        total = _all_experts(ctx, layer)
    elif all(isinstance(size, int | np.integer) for size in x.shape):
        total = _used_experts(ctx, layer)
    else:
        total = _used_experts_accumulated(ctx, layer)
    return ctx.cast(total, MIL_NAMES[dtype])


@dataclass(frozen=True)
class Layer:
    """The experts of one layer.

    Args:
        dense: Routing weights [T, E] float32, 0 for experts that were not selected.
        count: Number of experts E.
        x: Input of the experts [T, H].
        name: Prefix of the names of their results.
        expert: Lowers the expert of a given index; returns its output [T, H].
    """

    dense: Var
    count: int
    x: Var
    name: str
    expert: Callable[[int], Var]

    def split(self, ctx: Context, size: int) -> Sequence[Var]:
        """The routing weights in groups of `size` experts (the last may be smaller): [T, size] each."""
        sizes = [min(size, self.count - start) for start in range(0, self.count, size)]
        if len(sizes) == 1:
            return [self.dense]
        even = len(set(sizes)) == 1
        how = {"num_splits": ctx.constant(np.int32(len(sizes)))} if even else {"split_sizes": ctx.ints(*sizes)}
        parts: Sequence[Var] = ctx.mb.split(x=self.dense, axis=ctx.constant(np.int32(1)), **how)
        return parts


def _used_experts(ctx: Context, layer: Layer) -> Var:
    """The weighted sum over experts, for few tokens: experts without tokens are skipped and yield zeros."""
    mb, zeros = ctx.mb, ctx.constant(np.zeros(layer.x.shape, NUMPY[ctx.type_name(layer.x)]))

    def run(index: int) -> Var:
        with ctx.branch():
            return layer.expert(index)

    results = [
        mb.cond(
            pred=_is_used(ctx, own)[1],
            _true_fn=partial(run, index),
            _false_fn=lambda: mb.identity(x=zeros),
            name=f"{layer.name}_{index}",
        )
        for index, own in enumerate(layer.split(ctx, 1))
    ]
    # With one token, an executed expert is one that the token uses, so no row needs to be masked.
    return _weighted(ctx, results, layer.dense, masked=layer.x.shape[0] != 1)


def _used_experts_accumulated(ctx: Context, layer: Layer) -> Var:
    """As `_used_experts`, but adds up one expert after another, so that memory does not grow with their number."""
    mb = ctx.mb
    # Experts are summed in fp32, as in the reference.
    total = mb.fill_like(ref_tensor=layer.x, value=np.float32(0))
    for index, own in enumerate(layer.split(ctx, 1)):
        used, needed = _is_used(ctx, own)

        def run(index: int, total: Var, own: Var, used: Var) -> Var:
            with ctx.branch():
                share = mb.mul(x=ctx.cast(layer.expert(index), "fp32"), y=own)
                return mb.add(x=total, y=_mask_unused(ctx, used, share))

        total = mb.cond(
            pred=needed,
            _true_fn=partial(run, index, total, own, used),
            _false_fn=partial(mb.identity, x=total),
            name=f"{layer.name}_{index}",
        )
    return total


def _is_used(ctx: Context, own: Var) -> tuple[Var, Var]:
    """Whether each token uses an expert with the routing weights `own` [T, 1], and whether any does (a scalar)."""
    mb, used = ctx.mb, ctx.mb.not_equal(x=own, y=ctx.tensor(0.0, torch.float32))
    if own.shape[0] == 1:
        return used, mb.squeeze(x=used, axes=ctx.ints(0, 1))
    # In families whose experts scale their input, decode has one row for each of the token's slots.
    taken = mb.reduce_max(x=ctx.cast(used, "int32"), axes=ctx.ints(0, 1), keep_dims=ctx.constant(False))
    return used, ctx.cast(taken, "bool")


GROUP_ROWS = 1024
"""Maximum number of rows of expert outputs that are summed at once; each element takes 12 bytes meanwhile."""


def _all_experts(ctx: Context, layer: Layer) -> Var:
    """The weighted sum over all experts, each computed for every token; it sums groups of them, to need fewer ops."""
    size = max(1, min(8, GROUP_ROWS // ctx.settings.chunk))
    sums = []
    for number, weights in enumerate(layer.split(ctx, size)):
        group = range(number * size, min((number + 1) * size, layer.count))
        sums.append(_weighted(ctx, [layer.expert(index) for index in group], weights, masked=True))
    return reduce(lambda total, item: ctx.mb.add(x=total, y=item), sums)


def _weighted(ctx: Context, results: Sequence[Var], weights: Var, *, masked: bool) -> Var:
    """The weighted sum of expert outputs, [T, H], computed in fp32 as in the reference.

    Args:
        ctx: The lowering.
        results: The output [T, H] of each expert.
        weights: Routing weights [T, experts] float32.
        masked: Whether weights may be 0, so that their rows must be masked.
    """
    mb, own = ctx.mb, ctx.mb.expand_dims(x=weights, axes=ctx.ints(2))
    stacked = mb.stack(values=results, axis=ctx.constant(np.int32(1)))
    if masked:
        stacked = _mask_unused(ctx, mb.not_equal(x=own, y=ctx.tensor(0.0, torch.float32)), stacked)
    share = mb.mul(x=ctx.cast(stacked, "fp32"), y=own)
    return mb.reduce_sum(x=share, axes=ctx.ints(1), keep_dims=ctx.constant(False))


def _mask_unused(ctx: Context, used: Var, result: Var) -> Var:
    """`result` with zeros in the rows that are not `used`, even if the expert yields NaN there."""
    return ctx.mb.select(cond=used, a=result, b=ctx.constant(NUMPY[ctx.type_name(result)](0)))


def _expert(ctx: Context, node: fx.Node, x: Var, layer: int, index: int) -> Var:
    own, dtype = Experts.of(node), result_dtype(node)
    projected = _project(ctx, x, (own.gate_up_proj, own.gate_up_bias), index, (layer, "up"), dtype)
    activated = activate(ctx, projected, own.gate, dtype)
    return _project(ctx, activated, (own.down_proj, own.down_bias), index, (layer, "down"), dtype)


def _project(
    ctx: Context,
    x: Var,
    tensors: tuple[fx.Node, fx.Node | None],
    index: int,
    place: tuple[int, str],
    dtype: torch.dtype,
) -> Var:
    layer, part = place
    name = f"{EXPERT_SCOPE}{layer}_{index}_{part}"
    weight, bias = (
        None if item is None else _row(ctx, item, index, dtype, f"{letter}{layer}_{{}}_{part}")
        for item, letter in zip(tensors, "wb", strict=True)
    )
    assert weight is not None
    bias = ctx.zeros(int(weight.shape[0]), dtype) if bias is None else bias
    return ctx.mb.linear(x=x, weight=weight, bias=bias, name=name)


def _row(ctx: Context, argument: fx.Node, index: int, dtype: torch.dtype, pattern: str) -> Var:
    name = ctx.program.weights.resolve(str(argument.target))
    ctx.expert_tensors[name] = pattern
    return ctx.pool.row(ctx.mb, name, ctx.lazy(argument), MIL_NAMES[dtype], index, pattern.format(index))


def activate(ctx: Context, projected: Var, gate: Gate, dtype: torch.dtype) -> Var:
    """Apply `gate` to `projected` [..., 2I] ([..., I] if ungated) -> [..., I]."""
    axis = len(projected.shape) - 1
    if not gate.gated:
        parts = [projected]
    elif gate.interleaved:
        parts = [cut(ctx, projected, axis, start, None, 2) for start in (0, 1)]
    else:
        number, place = ctx.constant(np.int32(2)), ctx.constant(np.int32(axis))
        parts = list(ctx.mb.split(x=projected, num_splits=number, axis=place))
    return gated(_Functions(ctx, dtype), gate, parts)


@dataclass(frozen=True)
class _Functions:
    """See `moec.targets.common.gate.Functions`."""

    ctx: Context
    dtype: torch.dtype

    def unary(self, name: str, x: Var) -> Var:
        if name in _GELU:
            return self.ctx.mb.gelu(x=x, mode=_GELU[name])
        return getattr(self.ctx.mb, name)(x=x)

    def binary(self, name: str, x: Var, y: Any) -> Var:
        mb = self.ctx.mb
        if name == "clip":
            high, low = self.ctx.tensor(y, self.dtype), self.ctx.tensor(-y, self.dtype)
            return mb.maximum(x=mb.minimum(x=x, y=high), y=low)
        function = {"add": mb.add, "mul": mb.mul, "min": mb.minimum}[name]
        return function(x=x, y=self.ctx.tensor(y, self.dtype) if isinstance(y, int | float) else y)


def _select(ctx: Context, node: fx.Node) -> Var:
    """`moec::select`: zero the dropped slots and, with `renormalize`, scale the others to the sum of the row."""
    own, mb, dtype = Select.of(node), ctx.mb, result_dtype(node)
    value = ctx.tensor(own.weights)
    kept = mb.select(cond=ctx.tensor(own.keep), a=value, b=ctx.tensor(0.0, dtype))
    if not own.renormalize:
        return kept
    before, after = (mb.reduce_sum(x=item, axes=ctx.ints(1), keep_dims=True) for item in (value, kept))
    # The divisor is at least the smallest normal number, so a row of zeros stays zeros.
    safe = mb.maximum(x=after, y=ctx.tensor(float(torch.finfo(dtype).tiny), dtype))
    return mb.mul(x=kept, y=mb.real_div(x=before, y=safe))


TABLE: Mapping[Any, Lowering] = {EXPERTS: _experts, SELECT: _select}
