"""`moec::experts` and `moec::select`.

Decode wraps each expert in a `cond`, so that one whose weight is 0 is not executed. Prefill computes every expert for
every token and drops what its weight does not ask for: with many tokens nearly every expert is needed by some token,
and a graph without branches is what the GPU and the neural engine run best. Both read the same stored weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ops import Gate
from moec.compiler.program import EXPERTS, SELECT
from moec.targets.coreml.context import MIL_NAMES, NUMPY, Context, Var, result_dtype
from moec.targets.coreml.lowerings.elementwise import Lowering, where
from moec.targets.coreml.lowerings.shape import cut


def gate_of(node: fx.Node) -> Gate:
    """The activation of an experts node."""
    activation, gated, interleaved, _transposed, alpha, limit, up_offset = node.args[7:14]
    return Gate(activation, gated, interleaved, alpha, limit, up_offset)  # type: ignore[arg-type]


def dense_weights(ctx: Context, node: fx.Node) -> Var:
    """Routing weights as [T, E] float32: 0 for every expert that a token does not use."""
    indices, weights, gate_up = node.args[1:4]
    mb, count = ctx.mb, int(gate_up.meta["val"].shape[0])  # type: ignore[union-attr]
    experts = ctx.constant(np.arange(count, dtype=np.int32)[None, None])
    picked = mb.expand_dims(x=ctx.tensor(indices, torch.int32), axes=ctx.ints(2))
    hot = ctx.cast(mb.equal(x=picked, y=experts), "fp32")
    spread = mb.mul(x=hot, y=mb.expand_dims(x=ctx.tensor(weights, torch.float32), axes=ctx.ints(2)))
    return mb.reduce_sum(x=spread, axes=ctx.ints(1), keep_dims=ctx.constant(False))


def _experts(ctx: Context, node: fx.Node) -> Var:
    hidden, gate_up = node.args[0], node.args[3]
    if not all(item is None or (isinstance(item, fx.Node) and item.op == "get_attr") for item in node.args[3:7]):
        raise ctx.refuse(node, "the weights of the experts are computed in the graph", "run the common passes")
    count, dtype = int(gate_up.meta["val"].shape[0]), result_dtype(node)  # type: ignore[union-attr]
    x, dense = ctx.tensor(hidden, dtype), dense_weights(ctx, node)
    layer = ctx.shared("experts layers", lambda: [0])
    # Experts are summed in fp32, as the reference does.
    total = _zeros(ctx, x)
    add = _skipped if ctx.settings["skip_experts"] else _masked
    # Made here once, for every branch to refer to: inside of a branch each would be made again.
    for shared in (2, len(x.shape) - 1):
        ctx.constant(np.int32(shared))
    ctx.text("fp32")
    columns = [dense] if count == 1 else ctx.mb.split(x=dense, num_splits=count, axis=1)
    for index, own in enumerate(columns):
        total = add(ctx, total, own, f"experts_{layer[0]}_{index}", _expert(ctx, node, index, x, layer[0]))
    layer[0] += 1
    return ctx.cast(total, MIL_NAMES[dtype])


def _zeros(ctx: Context, x: Var) -> Var:
    """Zeros of the shape of `x` in fp32."""
    if all(isinstance(size, int | np.integer) for size in x.shape):
        return ctx.constant(np.zeros([int(size) for size in x.shape], np.float32))
    return ctx.mb.fill_like(ref_tensor=x, value=np.float32(0))


Expert = Callable[[], Var]


def _skipped(ctx: Context, total: Var, own: Var, name: str, expert: Expert) -> Var:
    """`total` plus the expert's results, if any token uses it."""
    mb = ctx.mb
    used = mb.not_equal(x=own, y=ctx.tensor(0.0, torch.float32))
    several = own.shape[0] != 1
    if several:
        # A family whose experts scale their input has a row for each slot of the one token.
        taken = mb.reduce_max(x=ctx.cast(used, "int32"), axes=ctx.ints(0, 1), keep_dims=ctx.constant(False))
        needed = ctx.cast(taken, "bool")
    else:
        needed = mb.squeeze(x=used, axes=ctx.ints(0, 1))

    def run() -> Var:
        with ctx.branch():
            share = mb.mul(x=ctx.cast(expert(), "fp32"), y=own)
            return mb.add(x=total, y=_of_used(ctx, used, share) if several else share)

    return mb.cond(pred=needed, _true_fn=run, _false_fn=lambda: mb.identity(x=total), name=name)


def _masked(ctx: Context, total: Var, own: Var, name: str, expert: Expert) -> Var:
    """`total` plus the expert's results, computed for every token."""
    mb = ctx.mb
    share = mb.mul(x=ctx.cast(expert(), "fp32"), y=own)
    used = mb.not_equal(x=own, y=ctx.tensor(0.0, torch.float32))
    return mb.add(x=total, y=_of_used(ctx, used, share), name=name)


def _of_used(ctx: Context, used: Var, share: Var) -> Var:
    """Only the rows whose weight is not 0: what the expert makes of the others, NaN too, is dropped."""
    return ctx.mb.select(cond=used, a=share, b=ctx.tensor(0.0, torch.float32))


def _expert(ctx: Context, node: fx.Node, index: int, x: Var, layer: int) -> Expert:
    gate_up, gate_up_bias, down, down_bias = node.args[3:7]

    def run() -> Var:
        projected = _project(ctx, node, x, (gate_up, gate_up_bias), index, f"experts_{layer}_{index}_gate_up")
        activated = _activate(ctx, projected, gate_of(node), result_dtype(node))
        return _project(ctx, node, activated, (down, down_bias), index, f"experts_{layer}_{index}_down")

    return run


def _project(ctx: Context, node: fx.Node, x: Var, tensors: tuple[Any, Any], index: int, name: str) -> Var:
    dtype, transposed = result_dtype(node), bool(node.args[10])
    labels = (name.replace("experts", "weights"), name.replace("experts", "biases"))
    weight, bias = (
        None if item is None else _row(ctx, item, index, dtype, label)
        for item, label in zip(tensors, labels, strict=True)
    )
    assert weight is not None
    if not transposed:
        width = int(weight.shape[0])
        return ctx.mb.linear(x=x, weight=weight, bias=ctx.zeros(width, dtype) if bias is None else bias, name=name)
    product = ctx.mb.matmul(x=x, y=weight, name=name)
    return product if bias is None else ctx.mb.add(x=product, y=bias)


def _row(ctx: Context, argument: fx.Node, index: int, dtype: torch.dtype, label: str) -> Var:
    name = ctx.program.weights.resolve(str(argument.target))
    ctx.settings["expert_tensors"].setdefault(name, {})[index] = label
    return ctx.pool.row(ctx.mb, name, ctx.lazy(argument), MIL_NAMES[dtype], index, label)


def _activate(ctx: Context, projected: Var, gate: Gate, dtype: torch.dtype) -> Var:
    mb = ctx.mb
    if not gate.gated:
        return _activation(ctx, projected, gate, dtype)
    axis = len(projected.shape) - 1
    if gate.interleaved:
        first, up = (cut(ctx, projected, axis, start, None, 2) for start in (0, 1))
    else:
        first, up = mb.split(x=projected, num_splits=ctx.constant(np.int32(2)), axis=ctx.constant(np.int32(axis)))
    if gate.limit:
        high, low = ctx.tensor(gate.limit, dtype), ctx.tensor(-gate.limit, dtype)
        first = mb.minimum(x=first, y=high)
        up = mb.maximum(x=mb.minimum(x=up, y=high), y=low)
    if gate.activation == "silu" and gate.alpha != 1.0:
        activated = mb.mul(x=first, y=mb.sigmoid(x=mb.mul(x=first, y=ctx.tensor(gate.alpha, dtype))))
    else:
        activated = _activation(ctx, first, gate, dtype)
    return mb.mul(x=activated, y=mb.add(x=up, y=ctx.tensor(gate.up_offset, dtype)) if gate.up_offset else up)


def _activation(ctx: Context, x: Var, gate: Gate, dtype: torch.dtype) -> Var:
    mb = ctx.mb
    match gate.activation:
        case "gelu":
            return mb.gelu(x=x, mode="EXACT")
        case "gelu_tanh":
            return mb.gelu(x=x, mode="TANH_APPROXIMATION")
        case "relu2":
            positive = mb.maximum(x=x, y=ctx.tensor(0.0, dtype))
            return mb.mul(x=positive, y=positive)
        case "identity":
            return x
        case name:
            return {"silu": mb.silu, "relu": mb.relu, "sigmoid": mb.sigmoid, "tanh": mb.tanh}[name](x=x)


def _select(ctx: Context, node: fx.Node) -> Var:
    """`moec::select`: zero what the policy drops, never the largest, and keep the sum of the row if asked."""
    weights, keep, renormalize = node.args
    mb, dtype = ctx.mb, result_dtype(node)
    value, count = ctx.tensor(weights, dtype), int(node.meta["val"].shape[1])
    best = mb.reduce_argmax(x=value, axis=1, keep_dims=True)
    largest = mb.equal(x=ctx.constant(np.arange(count, dtype=np.int32)[None]), y=best)
    zero, one = (ctx.constant(NUMPY[MIL_NAMES[dtype]](item)) for item in (0, 1))
    wanted = mb.logical_or(x=ctx.tensor(keep, torch.bool), y=largest)
    kept = mb.select(cond=wanted, a=value, b=zero)
    if not renormalize:
        return kept
    before, after = (mb.reduce_sum(x=item, axes=ctx.ints(1), keep_dims=True) for item in (value, kept))
    empty = mb.equal(x=after, y=zero)
    shape = tuple(after.shape)
    safe = where(ctx, empty, one, after, shape)
    ratio = where(ctx, empty, one, mb.real_div(x=before, y=safe), shape)
    return mb.mul(x=kept, y=ratio)


TABLE: Mapping[Any, Lowering] = {EXPERTS: _experts, SELECT: _select}
