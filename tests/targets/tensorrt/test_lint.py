"""Every rule of the dialect: what breaks it is named with op and module, and what TensorRT takes passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from moec.targets.tensorrt import lint

F, H, INT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64


def value(name: str, dtype: ir.DataType = F, rank: int = 2) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([4] * rank))


def constant(name: str, array: Any) -> ir.Value:
    tensor = ir.Tensor(np.asarray(array), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def check(
    op: str, inputs: list[ir.Value | None], *, domain: str = "", outputs: int = 1, opset: int = 24, **attributes: Any
) -> list[str]:
    node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs, name="the_node")
    initializers = [item for item in inputs if item is not None and item.const_value is not None]
    free = [item for item in inputs if item is not None and item.const_value is None]
    graph = ir.Graph(free, list(node.outputs), nodes=[node], initializers=initializers, opset_imports={"": opset})
    found = lint.check(ir.Model(graph, ir_version=11), {"the_node": "layers.0.mlp"})
    assert all(item.where in ("layers.0.mlp", "model") for item in found)
    return [item.reason for item in found]


def codes() -> ir.Value:
    return constant("codes", np.zeros((4, 4), np.int8))


BROKEN: dict[str, tuple[str, Any]] = {
    "standard-operators": ("QMoE", lambda: check("QMoE", [value("x")], domain="com.microsoft")),
    "known-operators": ("NonZero", lambda: check("NonZero", [value("x")])),
    "scatter-replaces": (
        "ScatterND",
        lambda: check("ScatterND", [value("x"), value("i", INT), value("u")], reduction="add"),
    ),
    "symmetric": (
        "DequantizeLinear",
        lambda: check("DequantizeLinear", [codes(), constant("s", np.float32(1)), constant("z", np.int8(3))]),
    ),
    "constant-codes": ("DequantizeLinear", lambda: check("DequantizeLinear", [value("x"), value("s")])),
    "attention": ("Attention", lambda: check("Attention", [value(name) for name in "qkv"], outputs=1)),
    "top-k": ("TopK", lambda: check("TopK", [value("x"), constant("k", np.array([4000]))], outputs=2)),
    "one-type": ("MatMul", lambda: check("MatMul", [value("x"), value("y", H)])),
    "types": ("Relu", lambda: check("Relu", [value("x", ir.DataType.DOUBLE)])),
}


def test_every_rule_is_tried() -> None:
    assert set(BROKEN) == {rule.name for rule in lint.RULES}


@pytest.mark.parametrize("rule", sorted(BROKEN))
def test_what_breaks_a_rule_is_named(rule: str) -> None:
    op, broken = BROKEN[rule]
    (reason,) = broken()
    assert reason.startswith(f"{op} breaks the rule {rule}: ")


def test_what_is_taken_passes() -> None:
    scale, zero = constant("s", np.float32(1)), constant("z", np.int8(0))
    assert not check("DequantizeLinear", [codes(), scale, zero])
    assert not check("Attention", [value(name, H) for name in "qkv"])
    assert not check("ScatterND", [value("x"), value("i", INT), value("u")])
    assert not check("TopK", [value("x"), constant("k", np.array([3840]))], outputs=2)
    assert not check("Where", [value("c", ir.DataType.BOOL), value("x"), value("y")])


def test_attention_with_a_past() -> None:
    past = [value(name, H) for name in ("q", "k", "v", "m", "pk", "pv")]
    assert "concatenated outside" in check("Attention", past, outputs=3)[0]


@pytest.mark.parametrize("opset", [16, 27])
def test_opset(opset: int) -> None:
    assert check("Relu", [value("x")], opset=opset) == [f"opset: the parser supports opsets 17 to 26, not {opset}"]
