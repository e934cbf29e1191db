#!/usr/bin/env bash
# The standard op Attention of ONNX Runtime on x86 takes longer the more of its scores are masked, by denormal numbers.
#
# Softmax computes exp of scores that a mask made very negative. If the result is a denormal float, as exp(-90) is, each
# vector takes the processor's slow path, and attention of 512 tokens takes many times as long as without a mask. With
# a mask of the lowest float it is still slower, as such numbers pass through the same polynomial. The session option
# `session.set_denormal_as_zero` removes both: the results are the same bits for the lowest float. So a mask should be
# the lowest float and never "some large negative number", and a causal prompt gains from the option.
#
# Times are of one thread, the smallest of several runs. Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'onnxruntime==1.32.0' 'onnx==1.23.2' 'numpy==2.4.6'
cat > "$folder/measure.py" <<'PY'
import sys
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

flush, mask_value = sys.argv[1], float(sys.argv[2])
B, H, S, D = 1, 8, 512, 64
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [B, H, S, D]) for name in ("q", "k", "v")]
inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [S, S]))
output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [B, H, S, D])
node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])
graph = helper.make_graph([node], "g", inputs, [output])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("session.set_denormal_as_zero", flush)
session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
random = np.random.default_rng(0)
feeds = {name: random.standard_normal((B, H, S, D), dtype=np.float32) for name in ("q", "k", "v")}
feeds["mask"] = np.triu(np.full((S, S), mask_value, np.float32), 1)
times = []
for _ in range(7):
    start = time.perf_counter()
    result = session.run(None, feeds)[0]
    times.append(time.perf_counter() - start)
print(min(times) * 1e3, hash(result.tobytes()))
PY
"$folder/venv/bin/python" - "$folder/measure.py" <<'PY'
import importlib.metadata
import os
import platform
import subprocess
import sys

if platform.machine() != "x86_64":
    sys.exit("this is about x86")


def measured(flush: str, mask: str) -> tuple[float, str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, sys.argv[1], flush, mask]
    milliseconds, digest = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    return float(milliseconds), digest


lowest = str(-3.4028234663852886e38)
rows = {name: measured(*given) for name, given in {
    "no mask": ("0", "0"),
    "mask of the lowest float": ("0", lowest),
    "mask of -90": ("0", "-90"),
    "mask of the lowest float, denormals off": ("1", lowest),
    "mask of -90, denormals off": ("1", "-90"),
}.items()}
print("onnxruntime", importlib.metadata.version("onnxruntime"))
for name, (milliseconds, _) in rows.items():
    print(f"{name}: {milliseconds:.1f} ms")
bits = rows["mask of the lowest float"][1] == rows["mask of the lowest float, denormals off"][1]
print("the same bits with denormals off:", bits)
slow = rows["mask of -90"][0] > 4 * rows["mask of -90, denormals off"][0]
slower = rows["mask of the lowest float"][0] > 1.3 * rows["mask of the lowest float, denormals off"][0]
sys.exit(0 if bits and slow and slower else 1)
PY
