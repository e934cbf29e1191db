#!/usr/bin/env bash
# ONNX Runtime's Attention refuses an attn_mask that has one row for all queries.
#
# The specification of ai.onnx Attention (opset 23 and later) says of attn_mask that its shape must be broadcastable to
# (batch_size, q_num_heads, q_sequence_length, total_sequence_length). A padding mask [B, 1, 1, T] is the usual case of
# that, and the reference implementation of the package onnx accepts it. The CPU kernel of ONNX Runtime broadcasts the
# first two axes alone. A session is made without an error and the first run fails, so an exporter has to expand the
# mask to all queries; the same mask as [B, 1, S, T] gives the result of the reference.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'onnx==1.22.0' 'onnxruntime==1.32.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

B, H, S, T, D = 2, 2, 3, 3, 4
random = np.random.default_rng(0)
query, key, value = (random.standard_normal((B, H, S, D)).astype(np.float32) for _ in range(3))
row = np.array([[True, True, False], [True, True, True]]).reshape(B, 1, 1, T)


def model(rows: int) -> bytes:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (B, H, S, D)) for name in "qkv"]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, (B, 1, rows, T)))
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, (B, H, S, D))]
    graph = helper.make_graph([helper.make_node("Attention", ["q", "k", "v", "mask"], ["out"])], "g", inputs, outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()


def run(rows: int) -> np.ndarray | str:
    session = onnxruntime.InferenceSession(model(rows), providers=["CPUExecutionProvider"])
    mask = np.ascontiguousarray(np.broadcast_to(row, (B, 1, rows, T)))
    try:
        return session.run(None, {"q": query, "k": key, "v": value, "mask": mask})[0]
    except Exception as error:
        return str(error)


reference = ReferenceEvaluator(onnx.load_from_string(model(1))).run(
    None, {"q": query, "k": key, "v": value, "mask": row}
)[0]
expanded, broadcast = run(S), run(1)
for package in (onnx, onnxruntime):
    print(package.__name__, package.__version__)
print("mask [B, 1, S, T]: largest difference from the reference", float(np.abs(expanded - reference).max()))
print("mask [B, 1, 1, T]:", broadcast.strip().rpartition("was false. ")[2] if isinstance(broadcast, str) else np.abs(broadcast - reference).max())
same = np.allclose(expanded, reference, atol=1e-5) and isinstance(broadcast, str)
sys.exit(0 if same else 1)
PY
