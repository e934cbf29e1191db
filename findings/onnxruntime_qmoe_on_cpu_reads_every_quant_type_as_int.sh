#!/usr/bin/env bash
# ONNX Runtime's QMoE on CPU reads float4 weights as integers, without an error.
#
# The attribute quant_type of com.microsoft::QMoE says what the packed codes are: int (the default), fp4, nvfp4,
# wfp4afp8 or fp8. The CPU kernel ignores it. A file that holds float4 codes (E2M1, whose code 7 stands for 6) opens,
# runs, and gives the outputs of the same codes read as integers of an offset of 8 (7 stands for -1), bit for bit. So
# an export for another execution provider gives wrong logits on CPU, where a kernel that lacks a type could refuse it.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'onnxruntime==1.32.0' 'onnx==1.23.2' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

EXPERTS, WIDTH, BLOCK = 2, 32, 32
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
random = np.random.default_rng(0)
codes = random.integers(0, 16, (2, EXPERTS, WIDTH, WIDTH), dtype=np.uint8)
packed = codes[..., 0::2] | codes[..., 1::2] << 4
scales = np.full((EXPERTS, WIDTH, WIDTH // BLOCK), 0.125, np.float32)
x = random.standard_normal((3, WIDTH)).astype(np.float32)
router = np.tile(np.array([[5.0, -5.0]], np.float32), (3, 1))


def model(quant_type):
    inputs = ["x", "router", "first", "scales", "", "second", "scales2"]
    node = helper.make_node(
        "QMoE", inputs, ["y"], domain="com.microsoft", k=1, activation_type="identity", normalize_routing_weights=1,
        expert_weight_bits=4, block_size=BLOCK, quant_type=quant_type,
    )  # fmt: skip
    constants = {"first": packed[0], "scales": scales, "second": packed[1], "scales2": scales}
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [info("x", TensorProto.FLOAT, [3, WIDTH]), info("router", TensorProto.FLOAT, [3, EXPERTS])],
        [info("y", TensorProto.FLOAT, None)], [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(quant_type):
    options = ort.SessionOptions()
    options.log_severity_level = 0 if quant_type == "log" else 3
    session = ort.InferenceSession(model(quant_type).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "router": router})[0]


def reference(values):
    first, second = (values[part[0]] * 0.125 for part in codes)
    return (x @ first.T) @ second.T


integers, floats = run("int"), run("fp4")
as_int, as_fp4 = (reference(table) for table in (np.arange(16, dtype=np.float32) - 8, FP4))
error = lambda found, want: float(np.abs(found - want).max() / np.abs(want).max())  # noqa: E731
print("onnxruntime", ort.__version__, "onnx", onnx.__version__)
print(f"quant_type=int: {error(integers, as_int):.1e} from the codes as integers")
print(f"quant_type=fp4: {error(floats, as_fp4):.1e} from the codes as float4, {error(floats, as_int):.1e} as integers")
print("the same bits for int and fp4:", bool(np.array_equal(integers, floats)))
sys.exit(0 if np.array_equal(integers, floats) and error(integers, as_int) < 1e-3 < error(floats, as_fp4) else 1)
PY
