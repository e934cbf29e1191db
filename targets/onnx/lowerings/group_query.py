"""`moec::attention` as ONNX Runtime's GroupQueryAttention, whose past and present may share one buffer.

The buffer is as long as the longest answer, so the length of the past says nothing: the attention mask does. Padding on
the left, chunks and the like reach the kernel as a bias; it cuts at the causal diagonal and at a window by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.operands import Attention
from moec.compiler.ir.program import ATTENTION, INDEXER, Program, StateSpec, module_of
from moec.targets.common.arguments import result_dtype
from moec.targets.onnx.context import MS, Context, np_dtype

HEAD_MULTIPLE = 8
RECURRENT_KINDS = {"conv", "recurrent"}


def share_lengths(ctx: Context) -> None:
    """Take the length of the past from the attention mask, before anybody asks a buffer for it."""
    placeholders = {node.name: node for node in ctx.program.graph.find_nodes(op="placeholder")}
    total = ctx.axis_length(placeholders["attention_mask"], 1)
    new = ctx.axis_length(placeholders["input_ids"], 1)
    ctx.shared(("size", str(ctx.program.dims["past_sequence"])), lambda: ctx.op("Sub", total, new))
    ctx.shared("total length", lambda: total)


def group_query_attention(ctx: Context, node: fx.Node, allowed: ir.Value) -> Sequence[ir.Value]:
    """Lower one attention node.

    Args:
        ctx: The lowering, on which `share_lengths` was called.
        node: A `moec::attention`.
        allowed: What each new token may attend to, [B, 1, S, T] bool.
    """
    own = Attention.of(node)
    query, key, value = own.query, own.key, own.value
    dtype = result_dtype(query)
    heads, groups, width = (int(size) for size in (query.meta["val"].shape[1], *key.meta["val"].shape[1:4:2]))
    attributes: dict[str, float] = {"local_window_size": own.window} if own.kind == "sliding" else {}
    if own.softcap:
        attributes["softcap"] = own.softcap
    out, present_key, present_value = ctx.ops(
        "GroupQueryAttention",
        *(_flat(ctx, item, count * width) for item, count in ((query, heads), (key, groups), (value, groups))),
        ctx.tensor(own.past_key),
        ctx.tensor(own.past_value),
        *_lengths(ctx, query),
        None,
        None,
        None,
        _bias(ctx, allowed, dtype),
        None if own.sinks is None else ctx.tensor(own.sinks, dtype),
        outputs=3,
        domain=MS,
        num_heads=heads,
        kv_num_heads=groups,
        scale=own.scale,
        do_rotary=0,
        **attributes,
    )
    return ctx.op("Reshape", out, ctx.ints(0, 0, heads, width)), present_key, present_value


def _flat(ctx: Context, argument: object, width: int) -> ir.Value:
    """[B, H, S, D] -> [B, S, H * D]."""
    turned = ctx.op("Transpose", ctx.tensor(argument), perm=[0, 2, 1, 3])
    return ctx.op("Reshape", turned, ctx.ints(0, 0, width))


def _lengths(ctx: Context, query: fx.Node) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k` [B], index of the last token, and the total length: padding on the left counts as tokens."""

    def total() -> ir.Value:
        return ctx.op("Cast", ctx.memo["total length"], to=int(ir.DataType.INT32))

    def last() -> ir.Value:
        one = ctx.constant(np.int32(1))
        batch = ctx.op("Reshape", ctx.axis_length(query, 0), ctx.ints(1))
        return ctx.op("Expand", ctx.op("Sub", ctx.shared("total int32", total), one), batch)

    return ctx.shared("last slots", last), ctx.shared("total int32", total)


def _bias(ctx: Context, allowed: ir.Value, dtype: torch.dtype) -> ir.Value:
    def make() -> ir.Value:
        # Half the range: added to any logit it stays finite, so that a row of padding alone is no NaN.
        lowest = ctx.constant(np.asarray(torch.finfo(dtype).min / 2, np_dtype(dtype)))
        return ctx.op("Where", allowed, ctx.constant(np.asarray(0, np_dtype(dtype))), lowest)

    return ctx.shared(("bias", allowed.name, dtype), make)


def refusals(program: Program) -> tuple[Rejection, ...]:
    """What onnxruntime-genai's one description of a cache cannot say about `program`."""
    if lonely := _lonely_states(program):
        return lonely
    if indexers := program.nodes(INDEXER):
        reason = "onnxruntime-genai has no cache for the keys of an indexer"
        return (Rejection("onnx", module_of(indexers[0]), reason),)
    found = []
    for node in program.nodes(ATTENTION):
        own = Attention.of(node)
        key, value = own.key.meta["val"], own.value.meta["val"]
        if key.shape[3] != value.shape[3]:
            reason = f"GroupQueryAttention needs keys and values of one width, not {key.shape[3]} and {value.shape[3]}"
            found.append(Rejection("onnx", module_of(node), reason))
        elif int(key.shape[3]) % HEAD_MULTIPLE:
            reason = f"GroupQueryAttention on CPU needs heads of a multiple of {HEAD_MULTIPLE} wide, not {key.shape[3]}"
            found.append(Rejection("onnx", module_of(node), reason))
    shapes = {(heads_of(state), width_of(state)) for state in program.caches}
    if not found and len(shapes) > 1:
        sizes = ", ".join(f"{heads} x {width}" for heads, width in sorted(shapes))
        found.append(Rejection("onnx", "the model", f"onnxruntime-genai wants caches of one shape, not {sizes}"))
    layers = sorted({state.layer for state in program.states})
    if not program.replaced and layers != list(range(len(layers))):
        found.append(Rejection("onnx", "the model", "onnxruntime-genai wants a cache in every layer"))
    return tuple(found)


def _lonely_states(program: Program) -> tuple[Rejection, ...]:
    """onnxruntime-genai finds the states of recurrent layers by their names, and each must keep one of either kind."""
    for state in program.replaced:
        kinds = {other.kind for other in program.replaced if other.layer == state.layer}
        if kinds != RECURRENT_KINDS:
            reason = (
                f"it keeps a state of kind {state.kind} alone, and onnxruntime-genai wants that of a convolution and "
                "that of a recurrence in every recurrent layer"
            )
            return (Rejection("onnx", f"layer {state.layer}", reason),)
    return ()


def heads_of(state: StateSpec) -> int:
    """Number of heads in a cache."""
    return int(state.input.shape[1])


def width_of(state: StateSpec) -> int:
    """Width of a head in a cache."""
    return int(state.input.shape[3])
