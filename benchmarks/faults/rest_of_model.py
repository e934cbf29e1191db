"""Faults of norms, embeddings, the head, residual paths, precision, and recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from faults.edits import (
    applied,
    argument,
    aten,
    calls,
    exchanged,
    nth,
    operand_through,
    result,
    rewritten,
    rolled,
    rounded_to,
    skipped,
    through,
    where,
    with_argument,
    with_operands,
    with_weight,
)
from faults.fault import Fault
from moec.compiler.ir.program import ATTENTION, CAUSAL_CONV, EXPERTS, LINEAR_ATTENTION, RMS_NORM, Program
from moec.compiler.ir.weights import Constant
from moec.passes.rewriting import Rewrite


def rows_exchanged(first: int, second: int):
    def change(matrix: Tensor) -> Tensor:
        matrix[[first, second]] = matrix[[second, first]]
        return matrix

    return change


def truncated(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16).to(value.dtype)


def last_layer_left_out(state: Rewrite) -> None:
    """The last norm reads the hidden states before the last layer."""
    norms = calls(state.graph, RMS_NORM)
    norms[-1].replace_input_with(norms[-1].args[0], norms[-3].args[0])


def residual_dropped(state: Rewrite) -> None:
    """The output of the first attention replaces the residual stream."""
    total = calls(state.graph, RMS_NORM)[1].args[0]
    total.replace_all_uses_with(total.args[1])


def head_of_its_own(program: Program) -> Program:
    """A head that is tied to the embedding gets weights of its own."""
    graph = program.copy_graph()
    head = calls(graph, aten.linear.default)[-1].args[1]
    value = program.weights.read(str(head.target)).roll(1, 0)
    with graph.inserting_before(head):
        own = graph.create_node("get_attr", "lm_head.own")
    own.meta = dict(head.meta)
    calls(graph, aten.linear.default)[-1].update_arg(1, own)
    if not head.users:
        graph.erase_node(head)
    return program.replace(graph=graph, weights=program.weights.with_tensors({"lm_head.own": Constant(value)}))


def _logits(graph: fx.Graph) -> fx.Node:
    return graph.output_node().args[0][0]


def _multiplier(number: float):
    return where(aten.mul.Tensor, lambda node: node.args[1] == number)


def _mask_of_states(graph: fx.Graph) -> fx.Node:
    """The product that keeps padding out of the state of the convolution."""
    return argument(CAUSAL_CONV, "x")(graph)


FLOAT32 = ("onnx", "tflite", "tensorrt")
"""Targets that compute in float32; Core ML computes in float16, whose rounding is larger than this fault."""
NARROW = ("onnx", "tensorrt")
"""Targets that compute in float32 and can round in between. TFLite computes casts to float16 in float32."""

ATTENTION_OUT = result(ATTENTION, 0)

FAULTS = (
    Fault("norm", "epsilon 1e-3 in place of 1e-5", "mixtral", with_operands(RMS_NORM, None, eps=1e-3)),
    Fault(
        "norm",
        "epsilon 1e-4 in place of 1e-5 in the first norm",
        "mixtral",
        with_operands(RMS_NORM, eps=1e-4),
        targets=FLOAT32,
    ),
    Fault(
        "norm", "weight of another layer", "mixtral", exchanged("0.input_layernorm.weight", "1.input_layernorm.weight")
    ),
    Fault("norm", "weight dropped", "mixtral", with_operands(RMS_NORM, weight=None)),
    Fault(
        "norm",
        "one entry of a weight off by 1 %",
        "mixtral",
        with_weight("model.norm.weight", lambda value: _scaled(value)),
    ),
    Fault("norm", "bias of a layer norm dropped", "phimoe", with_argument(nth(aten.layer_norm.default), 3, None)),
    Fault("embedding", "two rows exchanged", "mixtral", with_weight("embed_tokens.weight", rows_exchanged(40, 41))),
    Fault(
        "embedding",
        "two rows of a large vocabulary exchanged",
        "large vocabulary",
        with_weight("embed_tokens.weight", rows_exchanged(19_000, 19_001)),
    ),
    Fault("embedding", "multiplier dropped", "granitemoe", skipped(_multiplier(2.0))),
    Fault("head", "two rows exchanged", "mixtral", with_weight("lm_head.weight", rows_exchanged(40, 41))),
    Fault("head", "a tied head has weights of its own", "granitemoe", head_of_its_own),
    Fault(
        "head", "bias dropped", "phimoe", with_argument(lambda graph: calls(graph, aten.linear.default)[-1], 2, None)
    ),
    Fault(
        "head",
        "scaling of the logits dropped",
        "granitemoe",
        skipped(where(aten.div.Tensor, lambda node: node.args[1] == 1.5)),
    ),
    Fault(
        "head",
        "softcap of the logits dropped",
        "beam",
        skipped(where(aten.tanh.default, lambda node: node.args[0].args[1] == 4.0)),
    ),
    Fault("layers", "last layer left out", "mixtral", rewritten(last_layer_left_out)),
    Fault("layers", "residual dropped", "mixtral", rewritten(residual_dropped)),
    Fault("layers", "residual multiplier dropped", "granitemoe", skipped(_multiplier(0.5))),
    Fault(
        "precision",
        "output of attention rounded to float16",
        "mixtral",
        through(ATTENTION_OUT, rounded_to(torch.float16)),
        targets=NARROW,
    ),
    Fault(
        "precision",
        "logits rounded to float16",
        "mixtral",
        through(_logits, rounded_to(torch.float16)),
        targets=NARROW,
    ),
    Fault(
        "precision",
        "hidden states of the experts rounded to float16",
        "mixtral",
        operand_through(EXPERTS, "hidden_states", rounded_to(torch.float16)),
        targets=NARROW,
    ),
    Fault(
        "precision",
        "a projection of attention truncated to bfloat16",
        "mixtral",
        with_weight("0.self_attn.q_proj.weight", truncated),
    ),
    Fault("precision", "the embedding truncated to bfloat16", "mixtral", with_weight("embed_tokens.weight", truncated)),
    Fault("precision", "the head truncated to bfloat16", "mixtral", with_weight("lm_head.weight", truncated)),
    Fault(
        "convolution",
        "kernel moved by one token",
        "qwen3_next",
        with_weight("conv1d.weight", lambda value: value.roll(1, -1)),
    ),
    Fault("convolution", "activation dropped", "qwen3_next", with_operands(CAUSAL_CONV, activation="identity")),
    Fault(
        "convolution", "state moved by one token", "qwen3_next", operand_through(CAUSAL_CONV, "state", rolled(2, 4, 1))
    ),
    Fault(
        "convolution",
        "state not carried",
        "qwen3_next",
        operand_through(CAUSAL_CONV, "state", applied(aten.mul.Tensor, 0.0)),
    ),
    Fault(
        "convolution", "padding enters the state", "qwen3_next", skipped(_mask_of_states), targets=("onnx", "tensorrt")
    ),
    Fault(
        "scan",
        "state decayed twice",
        "qwen3_next",
        operand_through(LINEAR_ATTENTION, "decay", applied(aten.mul.Tensor, 2.0)),
    ),
    Fault(
        "scan",
        "state not decayed",
        "qwen3_next",
        operand_through(LINEAR_ATTENTION, "decay", applied(aten.mul.Tensor, 0.0)),
    ),
    Fault(
        "scan",
        "state not carried",
        "qwen3_next",
        operand_through(LINEAR_ATTENTION, "state", applied(aten.mul.Tensor, 0.0)),
    ),
    Fault(
        "scan",
        "step size dropped",
        "qwen3_next",
        operand_through(
            LINEAR_ATTENTION,
            "beta",
            lambda graph, node: applied(aten.add.Tensor, 1.0)(graph, applied(aten.mul.Tensor, 0.0)(graph, node)),
        ),
    ),
    Fault("scan", "output not scaled", "qwen3_next", with_operands(LINEAR_ATTENTION, scale=1.0)),
    Fault(
        "scan",
        "heads of values in another order",
        "qwen3_next",
        operand_through(LINEAR_ATTENTION, "value", rolled(2, 4, 1)),
    ),
)


def _scaled(value: Tensor) -> Tensor:
    value[3] *= 1.01
    return value
