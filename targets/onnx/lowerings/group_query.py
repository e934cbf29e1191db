"""`moec::attention` as ONNX Runtime's GroupQueryAttention, whose past and present may share one buffer.

The buffer may be longer than the sequence, so the number of past tokens comes from the attention mask. Left padding,
chunks and the like reach the kernel as an additive bias; the kernel applies the causal mask and the sliding window.

The kernel has one head size, a multiple of 8, for queries, keys and values, and onnxruntime-genai one for all layers.
Narrower heads, such as the values of multi-head latent attention, are filled up with zeros, which change no product:

    query, key, value [B, H, S, D] -> Pad to [B, H, S, W] -> GroupQueryAttention -> [B, S, H, W] -> Slice [..., :D]

The kernel keeps a cache in int8 too, with a scale for each channel: it rounds new keys and values when it appends them,
to nearest, and computes with codes times scale, in the same step already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.operands import Attention
from moec.compiler.ir.program import CACHE_KINDS, INDEXER, Program, StateSpec, module_of
from moec.targets.common.arguments import result_dtype
from moec.targets.onnx.context import MS, Context, np_dtype
from moec.targets.onnx.lowerings.heads import apart, side_by_side

HEAD_MULTIPLE = 8
CODE_BITS = 8
"""Bits of a key or value in a cache of codes."""
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
    dtype, width = result_dtype(query), cache_width(ctx.program)
    heads, groups = (int(item.meta["val"].shape[1]) for item in (query, key))
    attributes: dict[str, float | str] = {"local_window_size": own.window} if own.kind == "sliding" else {}
    if own.softcap:
        attributes["softcap"] = own.softcap
    scales = [_scale(ctx, item, width) for item in (own.key_scale, own.value_scale) if item is not None]
    if scales:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": CODE_BITS}
    out, present_key, present_value = ctx.ops(
        "GroupQueryAttention",
        *(_flat(ctx, item, width) for item in (query, key, value)),
        ctx.tensor(own.past_key),
        ctx.tensor(own.past_value),
        *_lengths(ctx, query),
        None,
        None,
        None,
        _bias(ctx, allowed, dtype),
        None if own.sinks is None else ctx.tensor(own.sinks, dtype),
        *scales,
        outputs=3,
        domain=MS,
        num_heads=heads,
        kv_num_heads=groups,
        scale=own.scale,
        do_rotary=0,
        **attributes,
    )
    out, used = apart(ctx, query, out, width), int(value.meta["val"].shape[3])
    if used < width:
        out = ctx.op("Slice", out, ctx.ints(0), ctx.ints(used), ctx.ints(3))
    return out, present_key, present_value


def _flat(ctx: Context, argument: fx.Node, width: int) -> ir.Value:
    """[B, H, S, D] -> [B, S, H * width], each head filled up with zeros."""
    _, heads, _, used = argument.meta["val"].shape
    flat = side_by_side(ctx, argument)
    if flat is not None and used == width:
        return flat
    value = ctx.tensor(argument)
    if used < width:
        value = ctx.op("Pad", value, ctx.ints(0, 0, 0, 0, 0, 0, 0, width - used))
    turned = ctx.op("Transpose", value, perm=[0, 2, 1, 3])
    return ctx.op("Reshape", turned, ctx.ints(0, 0, heads * width))


def _scale(ctx: Context, argument: fx.Node, width: int) -> ir.Value:
    """Scales of a cache of codes, [heads, width] float32; those of the zeros that fill up a head are 1."""
    name, used = str(argument.target), int(argument.meta["val"].shape[1])
    value = ctx.tensor(argument)
    ctx.others[name] = {"initializer": name, "transposed": False}
    if used == width:
        return value
    return ctx.op("Pad", value, ctx.ints(0, 0, 0, width - used), ctx.constant(np.float32(1)))


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
    heads = sorted({heads_of(state) for state in program.caches})
    if len(heads) > 1:
        counts = ", ".join(map(str, heads))
        reason = f"onnxruntime-genai needs KV caches with the same number of heads in all layers, not {counts}"
        found.append(Rejection("onnx", "the model", reason))
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


def cache_width(program: Program) -> int:
    """Head size of all KV caches: the largest of the Program's, and a multiple of what the kernel takes."""
    widest = max(int(state.input.shape[3]) for state in program.caches)
    return -(-widest // HEAD_MULTIPLE) * HEAD_MULTIPLE


def with_equal_caches(program: Program) -> Program:
    """`program` with KV caches [batch, heads, tokens, `cache_width`], as `group_query_attention` fills them."""

    def widened(state: StateSpec) -> StateSpec:
        if state.kind not in CACHE_KINDS:
            return state
        past, present = (
            replace(end, shape=(*end.shape[:3], cache_width(program))) for end in (state.input, state.output)
        )
        return replace(state, input=past, output=present)

    return program.replace(states=tuple(map(widened, program.states)))
