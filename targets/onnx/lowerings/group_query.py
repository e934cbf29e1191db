"""`moec::attention` as ONNX Runtime's GroupQueryAttention, whose past and present may share one buffer.

The buffer may be longer than the sequence, so the number of past tokens comes from the attention mask. Left padding,
chunks and the like reach the kernel as an additive bias; the kernel applies the causal mask and the sliding window.
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
    """Define the length of the past by the attention mask. Call it before anything reads that length from a buffer."""
    placeholders = {node.name: node for node in ctx.program.graph.find_nodes(op="placeholder")}
    total = ctx.axis_length(placeholders["attention_mask"], 1)
    new = ctx.axis_length(placeholders["input_ids"], 1)
    ctx.shared(("size", str(ctx.program.dims["past_sequence"])), lambda: ctx.op("Sub", total, new))
    ctx.shared("total length", lambda: total)


def group_query_attention(ctx: Context, node: fx.Node, allowed: ir.Value) -> Sequence[ir.Value]:
    """Lower one attention node.

    Args:
        ctx: The lowering, after `share_lengths(ctx)`.
        node: A `moec::attention` node.
        allowed: Which slots each new token may attend to, [B, 1, S, T] bool.

    Returns:
            Output [B, S, H, D], present key and present value.
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
    """`seqlens_k` [B] (index of the last token) and the total length, both int32; left padding counts as tokens."""

    def total() -> ir.Value:
        return ctx.op("Cast", ctx.memo["total length"], to=int(ir.DataType.INT32))

    def last() -> ir.Value:
        one = ctx.constant(np.int32(1))
        batch = ctx.op("Reshape", ctx.axis_length(query, 0), ctx.ints(1))
        return ctx.op("Expand", ctx.op("Sub", ctx.shared("total int32", total), one), batch)

    return ctx.shared("last slots", last), ctx.shared("total int32", total)


def _bias(ctx: Context, allowed: ir.Value, dtype: torch.dtype) -> ir.Value:
    def make() -> ir.Value:
        # Half the range: the sum with any logit stays finite, so a row that is all padding does not become NaN.
        lowest = ctx.constant(np.asarray(torch.finfo(dtype).min / 2, np_dtype(dtype)))
        return ctx.op("Where", allowed, ctx.constant(np.asarray(0, np_dtype(dtype))), lowest)

    return ctx.shared(("bias", allowed.name, dtype), make)


def refusals(program: Program) -> tuple[Rejection, ...]:
    """What `genai_config.json`, which describes one KV cache for all layers, cannot express about `program`."""
    if incomplete := _incomplete_recurrent_layers(program):
        return incomplete
    if indexers := program.nodes(INDEXER):
        reason = "onnxruntime-genai has no cache for the keys of an indexer"
        return (Rejection("onnx", module_of(indexers[0]), reason),)
    found = []
    for node in program.nodes(ATTENTION):
        own = Attention.of(node)
        key, value = own.key.meta["val"], own.value.meta["val"]
        if key.shape[3] != value.shape[3]:
            sizes = f"{key.shape[3]} and {value.shape[3]}"
            reason = f"GroupQueryAttention needs keys and values of the same head size, not {sizes}"
            found.append(Rejection("onnx", module_of(node), reason))
        elif int(key.shape[3]) % HEAD_MULTIPLE:
            reason = f"GroupQueryAttention on CPU needs a multiple of {HEAD_MULTIPLE} as head size, not {key.shape[3]}"
            found.append(Rejection("onnx", module_of(node), reason))
    shapes = {(heads_of(state), width_of(state)) for state in program.caches}
    if not found and len(shapes) > 1:
        sizes = ", ".join(f"{heads} x {width}" for heads, width in sorted(shapes))
        found.append(Rejection("onnx", "the model", f"onnxruntime-genai needs KV caches of one shape, not {sizes}"))
    layers = sorted({state.layer for state in program.states})
    if not program.replaced and layers != list(range(len(layers))):
        found.append(Rejection("onnx", "the model", "onnxruntime-genai needs a KV cache in every layer"))
    return tuple(found)


def _incomplete_recurrent_layers(program: Program) -> tuple[Rejection, ...]:
    """The first recurrent layer without both kinds of state: onnxruntime-genai looks for both by name in each."""
    for state in program.replaced:
        kinds = {other.kind for other in program.replaced if other.layer == state.layer}
        if kinds != RECURRENT_KINDS:
            reason = (
                f"it keeps only a state of kind {state.kind}, but onnxruntime-genai needs a convolution state and a "
                "recurrent state in every recurrent layer"
            )
            return (Rejection("onnx", f"layer {state.layer}", reason),)
    return ()


def heads_of(state: StateSpec) -> int:
    """Number of heads in a KV cache."""
    return int(state.input.shape[1])


def width_of(state: StateSpec) -> int:
    """Head size of a KV cache."""
    return int(state.input.shape[3])
