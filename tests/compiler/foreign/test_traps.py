"""The table of operators that a runtime reads otherwise than it says."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from moec.compiler.foreign.traps import caught
from moec.targets.model_files import Operator

CPU = "onnxruntime 1.32.0, CPU"


@pytest.mark.parametrize("quant_type", ["fp4", "nvfp4", "wfp4afp8", "fp8"])
def test_codes_of_floats(quant_type: str) -> None:
    operators = [Operator("QMoE", f"layer.{n}", {"quant_type": quant_type}) for n in range(3)]
    (found,) = caught(operators, CPU)
    assert str(found) == f"QMoE layer.0 and 2 more: quant_type is {quant_type}, but the codes are read as integers"
    assert not caught(operators, "onnxruntime 1.32.0, CUDA")
    assert not caught(operators, "OpenVINO 2026.4, CPU")


def test_what_is_followed_is_no_trap() -> None:
    assert not caught([Operator("QMoE", "a"), Operator("QMoE", "b", {"quant_type": "int"}), Operator("MoE", "c")], CPU)


def test_only_some_releases() -> None:
    operators = [Operator("MoE", "a", {"normalize_routing_weights": 0})]
    assert not caught(operators, CPU)
    assert "zeros" in str(caught(operators, "onnxruntime 1.31.1, CPU")[0])


def test_the_runtime_does_what_the_table_says() -> None:
    """QMoE gives the same bits whatever its quant_type is."""
    results = [_run(quant_type) for quant_type in (None, "int", "fp4", "nvfp4", "wfp4afp8", "fp8")]
    assert np.abs(results[0]).max() > 0
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def _run(quant_type: str | None) -> np.ndarray:
    random, experts, width = np.random.default_rng(0), 2, 32
    codes = {f"w{n}": random.integers(0, 256, (experts, width * n, width // 2), np.uint8) for n in (2, 1)}
    scales = {f"s{n}": np.full((experts, width * n, 1), 0.1, np.float32) for n in (2, 1)}
    given = {} if quant_type is None else {"quant_type": quant_type}
    node = helper.make_node(
        "QMoE",
        ["x", "p", "w2", "s2", "", "w1", "s1"],
        ["y"],
        domain="com.microsoft",
        k=1,
        expert_weight_bits=4,
        block_size=width,
        activation_type="swiglu",
        swiglu_fusion=1,
        **given,
    )
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in (codes | scales).items()]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, size])
        for name, size in (("x", width), ("p", experts))
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, width])
    graph = helper.make_graph([node], "g", ports, [result], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {
        "x": random.standard_normal((3, width), np.float32),
        "p": random.standard_normal((3, experts), np.float32),
    }
    found: np.ndarray = session.run(None, inputs)[0]
    return found
