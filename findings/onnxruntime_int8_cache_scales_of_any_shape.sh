#!/usr/bin/env bash
# GroupQueryAttention of ONNX Runtime takes the scales of an int8 KV cache in any shape with as many elements.
#
# With k_quant_type PER_CHANNEL the inputs k_scale and v_scale hold one number for each channel of each head. The operator's
# schema says "Scale tensor for past_key" and no shape, and neither shape inference nor the kernel asks for one: only the
# number of elements is compared. They are read in the order [kv_num_heads, head_size]. So scales as [heads, channels],
# [1, heads, 1, channels] or flat give the same result, and scales that an exporter wrote as [channels, heads] run
# without a word and are taken for other channels'. A wrong result is all that shows it.
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
import onnxruntime
from onnx import TensorProto, helper

B, S, HEADS, KV_HEADS, D = 1, 3, 4, 2, 16
random = np.random.default_rng(0)
feeds = {name: random.standard_normal((B, S, heads * D)).astype(np.float32) for name, heads in zip("qkv", (4, 2, 2))}
feeds |= {name: np.zeros((B, KV_HEADS, 0, D), np.int8) for name in ("past_key", "past_value")}
feeds |= {"last": np.full(B, S - 1, np.int32), "total": np.full(1, S, np.int32)}
scales = random.uniform(0.01, 0.05, (KV_HEADS, D)).astype(np.float32)


def run(own: np.ndarray) -> np.ndarray:
    fed = {**feeds, "k_scale": own, "v_scale": own}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in fed.items()
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, (B, S, HEADS * D))]
    outputs += [helper.make_tensor_value_info(name, TensorProto.INT8, (B, KV_HEADS, S, D)) for name in ("pk", "pv")]
    names = ["q", "k", "v", "past_key", "past_value", "last", "total", *[""] * 5, "k_scale", "v_scale"]
    node = helper.make_node(
        "GroupQueryAttention", names, ["out", "pk", "pv"], domain="com.microsoft", num_heads=HEADS,
        kv_num_heads=KV_HEADS, k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=8,
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["out"], fed)[0]


print("onnxruntime", onnxruntime.__version__)
expected = run(scales)
same = True
for own in (scales.reshape(1, KV_HEADS, 1, D), scales.reshape(-1), scales.reshape(D, KV_HEADS)):
    difference = float(np.abs(run(own) - expected).max())
    print(f"the same numbers as {list(own.shape)}: largest difference {difference:.1e}")
    same &= difference == 0
difference = float(np.abs(run(np.ascontiguousarray(scales.T)) - expected).max())
print(f"transposed, {[D, KV_HEADS]}: no error, largest difference {difference:.1e}")
sys.exit(0 if same and difference > 1e-3 else 1)
PY
