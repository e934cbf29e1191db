"""`moec::experts` and `moec::select`: ONNX Runtime's `MoE` kernel, or standard ops.

On CPU, `MoE` with `normalize_routing_weights=0` silently returns zeros when it may run in place
(microsoft/onnxruntime#33866). This lowering therefore feeds it the logarithm of the routing weights, lets the kernel
normalise them, and multiplies the output by their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.experts import Gate
from moec.compiler.ir.operands import Experts, Select
from moec.compiler.ir.program import EXPERTS, SELECT, Program, module_of
from moec.quantize.lazy import Quantized
from moec.targets.common.arguments import result_dtype
from moec.targets.onnx.context import MS, Context, Lowering, np_dtype
from moec.targets.onnx.lowerings import quantized
from moec.targets.onnx.lowerings.decoded import is_decoded
from moec.targets.onnx.lowerings.grouped import grouped
from moec.targets.onnx.lowerings.layouts import kernel_layout

aten = torch.ops.aten
PLAIN_KERNELS = ("relu", "silu", "identity")
"""Ungated activations that the `MoE` kernel computes as torch does (its gelu is another approximation)."""


FLOAT_HINT = (
    "leave experts_gate_up and experts_down of these layers float with overrides in the plan (docs/quantization.md)"
)


def kernel_refusal(gate: Gate, coded: Sequence[Quantized], stacks: int) -> str:
    """Why `MoE` and `QMoE` of ONNX Runtime cannot compute these experts; empty where they can.

    Args:
        gate: The activation.
        coded: Those of the projections that are quantized.
        stacks: Number of projections.
    """
    if gate.gated and gate.activation != "silu":
        return f"the kernel has no gated {gate.activation}"
    if gate.limit and gate.limit_activated:
        return f"the kernel clamps the input of {gate.activation}, but this model clamps its output"
    if not gate.gated and gate.activation not in PLAIN_KERNELS:
        return f"the kernel has no {gate.activation}"
    if 0 < len(coded) < stacks:
        return "the kernel does not take one projection in floats and the other in integers"
    if not quantized.same_bits(*coded):
        return "the kernel needs the same number of bits for both projections"
    if odd := [stack.shape[-1] for stack in coded if not quantized.fills_bytes(stack)]:
        return f"the kernel cannot read rows of {odd[0]} int4 codes, which do not fill whole bytes"
    return ""


def refusals(program: Program) -> tuple[Rejection, ...]:
    """Quantized experts in a dialect of standard ops, which would need their weights as floats."""
    found = []
    for node in program.nodes(EXPERTS):
        own = Experts.of(node)
        form = _format(program, own.gate_up_proj) or _format(program, own.down_proj)
        if form:
            reason = f"standard ONNX has no product of quantized experts, so experts in {form} are not supported here"
            found.append(Rejection("onnx", module_of(node), reason, FLOAT_HINT))
    return tuple(found)


def _format(program: Program, argument: Any) -> str:
    """Format of a quantized weight, as text; empty for a float weight."""
    tensor = program.weights[str(argument.target)] if argument.op == "get_attr" else None
    return str(tensor.format) if isinstance(tensor, Quantized) else ""


def kernel_attributes(gate: Gate) -> dict[str, Any]:
    """Attributes of `MoE` and `QMoE` that select the activation `gate`."""
    if not gate.gated:
        return {"activation_type": gate.activation}
    attributes: dict[str, Any] = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": gate.alpha,
        "activation_beta": gate.up_offset,
    }
    return {**attributes, "swiglu_limit": gate.limit} if gate.limit else attributes


def dense_weights(ctx: Context, node: fx.Node) -> ir.Value:
    """Routing weights as [T, E]: 0 for every expert that was not selected for a token."""
    return _spread(ctx, node, ctx.tensor(Experts.of(node).weights, result_dtype(node)))


def is_select(weights: fx.Node) -> bool:
    """Whether routing weights are the output of a routing policy (`moec::select`)."""
    return weights.target is SELECT


def _spread(ctx: Context, node: fx.Node, slots: ir.Value) -> ir.Value:
    """Spread values per slot [T, k] to their experts, [T, E], with 0 elsewhere.

    It compares and sums over k. A scatter would have to add, since a dropped slot may name the same expert as a kept
    one, and adding from several threads loses updates in ONNX Runtime (microsoft/onnxruntime#18048, #23396).
    """
    operands, dtype = Experts.of(node), result_dtype(node)
    numbers = ctx.constant(np.arange(operands.num_experts, dtype=np.int64).reshape(1, 1, -1))
    own = ctx.op("Equal", ctx.op("Unsqueeze", ctx.tensor(operands.indices, torch.int64), ctx.ints(2)), numbers)
    zero = ctx.constant(np.asarray(0, np_dtype(dtype)))
    spread = ctx.op("Where", own, ctx.op("Unsqueeze", slots, ctx.ints(2)), zero)
    return ctx.op("ReduceSum", spread, ctx.ints(1), keepdims=0)


def _experts(ctx: Context, node: fx.Node) -> ir.Value:
    own = Experts.of(node)
    gate, contrib = own.gate, ctx.dialect.contrib
    stacks = [_stored(ctx, stack) for stack in (own.gate_up_proj, own.down_proj)]
    coded = [stack for stack in stacks if isinstance(stack, Quantized)]
    refusal = kernel_refusal(gate, coded, len(stacks)) if contrib else ""
    if refusal:
        ctx.reject(node, f"{refusal}: each expert runs as two matrix products")
    if refusal or not contrib or is_decoded(ctx, *coded):
        return grouped(ctx, node, gate)
    if coded:
        return _quantized(ctx, node, gate)
    return grouped(ctx, node, gate) if ctx.dialect.grouped else _kernel(ctx, node, gate)


def _stored(ctx: Context, argument: Any) -> Any:
    return ctx.program.weights[str(argument.target)] if argument.op == "get_attr" else None


def _quantized(ctx: Context, node: fx.Node, gate: Gate) -> ir.Value:
    attributes = kernel_attributes(gate)
    if ctx.dialect.recent_qmoe:
        dense = dense_weights(ctx, node)
        return quantized.experts(ctx, node, gate, dense, attributes, router_weights=dense)
    logits, sums = _normalised(ctx, node)
    return ctx.op("Mul", quantized.experts(ctx, node, gate, logits, attributes), sums)


def _normalised(ctx: Context, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    """Logits [T, E] from which a kernel makes the routing weights divided by their sum, and these sums, [T, 1].

    The kernel normalises the weights itself, so weights that a policy would renormalise are passed unscaled.
    """
    weights, dtype = Experts.of(node).weights, result_dtype(node)
    scaled = is_select(weights) and Select.of(weights).renormalize
    slots = _kept(ctx, weights) if scaled else ctx.tensor(weights, dtype)
    sums = _row_sum(ctx, Select.of(weights).weights if scaled else weights, dtype)
    if scaled:
        ctx.layers[-1] |= {"weights": (slots, dtype), "weight_sums": (sums, dtype)}
    return ctx.op("Log", _spread(ctx, node, slots)), sums


def _kernel(ctx: Context, node: fx.Node, gate: Gate) -> ir.Value:
    own = Experts.of(node)
    operands = [
        None if tensor is None else _kernel_tensor(ctx, tensor, gate, first=first)
        for tensor, first in (
            (own.gate_up_proj, True),
            (own.gate_up_bias, True),
            (own.down_proj, False),
            (own.down_bias, False),
        )
    ]
    logits, sums = _normalised(ctx, node)
    out = ctx.op(
        "MoE",
        ctx.tensor(own.hidden_states),
        logits,
        *operands,
        domain=MS,
        k=own.top_k,
        normalize_routing_weights=1,
        **kernel_attributes(gate),
    )
    return ctx.op("Mul", out, sums)


def _kernel_tensor(ctx: Context, argument: fx.Node, gate: Gate, *, first: bool) -> ir.Value:
    tensor = kernel_layout(ctx.lazy(argument), gate, first=first)
    name = ctx.program.weights.resolve(str(argument.target))
    interleaved = first and gate.gated and not gate.interleaved
    ctx.experts[name] = {"initializer": f"{name}.moe", "interleaved": interleaved, "transposed": False}
    half = ctx.stored_half(name)
    if half and tensor.dtype is torch.float32:
        ctx.experts[name]["initializer"] = f"{name}.moe.fp16"
    return ctx.initializer(f"{name}.moe", tensor, half=half)


def _select(ctx: Context, node: fx.Node) -> ir.Value:
    """`moec::select`: zero the dropped slots and, with `renormalize`, scale the others to the sum of the row."""
    own, kept = Select.of(node), _kept(ctx, node)
    if not own.renormalize:
        return kept
    dtype = result_dtype(node)
    tiny = ctx.constant(np.asarray(torch.finfo(dtype).tiny, np_dtype(dtype)))
    after = ctx.op("Max", ctx.op("ReduceSum", kept, ctx.ints(1), keepdims=1), tiny)
    return ctx.op("Mul", kept, ctx.op("Div", _row_sum(ctx, own.weights, dtype), after))


def _kept(ctx: Context, node: fx.Node) -> ir.Value:
    """The weights of a select node before they are renormalised: 0 in dropped slots."""
    own, dtype = Select.of(node), result_dtype(node)
    zero = ctx.constant(np.asarray(0, np_dtype(dtype)))

    def where() -> ir.Value:
        return ctx.op("Where", ctx.tensor(own.keep), ctx.tensor(own.weights, dtype), zero)

    return ctx.shared(("kept", node.name), where)


def _row_sum(ctx: Context, weights: fx.Node, dtype: torch.dtype) -> ir.Value:
    """Sum of the routing weights of each token, [T, 1]; the policy may have computed it already."""
    for user in weights.users:
        if user.target is aten.sum.dim_IntList and list(user.args[1:]) == [[1], True] and user in ctx:
            return ctx.tensor(user, dtype)
    return ctx.op("ReduceSum", ctx.tensor(weights, dtype), ctx.ints(1), keepdims=1)


TABLE: Mapping[Any, Lowering] = {EXPERTS: _experts, SELECT: _select}
