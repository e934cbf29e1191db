"""Rules for ONNX models that TensorRT can build, checked before the parser, whose messages name no module.

Everything that a rule refuses was seen to fail in the parser or, with worse messages, in the builder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moec.compiler.common.rejections import Rejection

OPSETS = range(17, 27)
LARGEST_K = 3840
LARGEST_RANK = 8
TYPES = frozenset(
    ir.DataType[name] for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "INT4", "BOOL")
)
REFUSED_OPS: Mapping[str, str] = {
    "NonZero": "the size of its result depends on values",
    "DynamicQuantizeLinear": "TensorRT does not quantize activations at run time",
    "MatMulInteger": "use DequantizeLinear and MatMul for integer products",
    "QLinearMatMul": "use DequantizeLinear and MatMul for integer products",
    "ConvInteger": "use DequantizeLinear and Conv for integer products",
}


@dataclass(frozen=True)
class Rule:
    """One rule: its name, and a function that returns why a node breaks it, or ""."""

    name: str
    broken: Callable[[ir.Node], str]


def _domain(node: ir.Node) -> str:
    return f"domain {node.domain}: the parser supports standard operators only" if node.domain else ""


def _operator(node: ir.Node) -> str:
    return REFUSED_OPS.get(node.op_type, "")


def _scatter(node: ir.Node) -> str:
    reduction = node.attributes.get_string("reduction", "none")
    if node.op_type in ("ScatterND", "ScatterElements") and reduction != "none":
        return f"reduction {reduction}: a scatter may only replace values, not combine them"
    return ""


def _zero_point(node: ir.Node) -> str:
    if node.op_type not in ("DequantizeLinear", "QuantizeLinear") or len(node.inputs) < 3 or node.inputs[2] is None:
        return ""
    constant = node.inputs[2].const_value
    if constant is None or np.any(constant.numpy()):
        return "its zero point must be 0 (symmetric quantization)"
    return ""


def _dequantized(node: ir.Node) -> str:
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return ""
    codes = node.inputs[0]
    if not codes.is_initializer():
        return "its codes must be constants"
    if codes.dtype not in (ir.DataType.INT8, ir.DataType.INT4):
        return f"codes of type {codes.dtype}: only int8 and int4 are supported"
    block = node.attributes.get_int("block_size", 0)
    rank = len(codes.shape) if codes.shape is not None else 0
    return "blocks need codes of 2 or 3 axes" if block and rank not in (2, 3) else ""


def _attention(node: ir.Node) -> str:
    if node.op_type != "Attention":
        return ""
    if any(value is not None for value in node.inputs[4:6]) or len(node.outputs) > 1:
        return "past and present keys must be concatenated outside of Attention"
    if any(value is not None and value.dtype == ir.DataType.FLOAT for value in node.inputs[:3]):
        return "float32: the parser accepts it, but the builder fails"
    return ""


def _top_k(node: ir.Node) -> str:
    if node.op_type != "TopK" or node.inputs[1] is None or node.inputs[1].const_value is None:
        return ""
    count = int(node.inputs[1].const_value.numpy().item())
    return f"k is {count}, but at most {LARGEST_K} is supported" if count > LARGEST_K else ""


def _mixed(node: ir.Node) -> str:
    if node.op_type not in ("MatMul", "Gemm", "Add", "Sub", "Mul", "Div", "Where", "Concat"):
        return ""
    operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
    kinds = {value.dtype for value in operands if value is not None and value.dtype is not None}
    return f"operands of several types: {', '.join(sorted(kind.name for kind in kinds))}" if len(kinds) > 1 else ""


def _types(node: ir.Node) -> str:
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype is not None and value.dtype not in TYPES:
            return f"type {value.dtype.name}"
        if value is not None and value.shape is not None and len(value.shape) > LARGEST_RANK:
            return f"a tensor of {len(value.shape)} axes: at most {LARGEST_RANK}"
    return ""


RULES = (
    Rule("standard-operators", _domain),
    Rule("known-operators", _operator),
    Rule("scatter-replaces", _scatter),
    Rule("symmetric", _zero_point),
    Rule("constant-codes", _dequantized),
    Rule("attention", _attention),
    Rule("top-k", _top_k),
    Rule("one-type", _mixed),
    Rule("types", _types),
)


def check_opset(opset: int) -> str:
    """Why the parser does not support an opset; empty if it does."""
    if opset in OPSETS:
        return ""
    return f"the parser supports opsets {OPSETS.start} to {OPSETS.stop - 1}, not {opset}"


def check(model: ir.Model, origins: Mapping[str, str]) -> tuple[Rejection, ...]:
    """Find all nodes of `model` that break a rule.

    Args:
        model: The lowered model.
        origins: Name of a node -> module of the PyTorch model that it was lowered from.

    Returns:
        One rejection per node and rule, with the module, the op, the rule and the reason.
    """
    found = []
    if reason := check_opset(model.opset_imports.get("", 0)):
        found.append(Rejection("tensorrt", "model", f"opset: {reason}"))
    for node in model.graph.all_nodes():
        where = origins.get(node.name or "", "") or str(node.name)
        found += [
            Rejection("tensorrt", where, f"{node.op_type} breaks the rule {rule.name}: {reason}")
            for rule in RULES
            if (reason := rule.broken(node))
        ]
    return tuple(found)
