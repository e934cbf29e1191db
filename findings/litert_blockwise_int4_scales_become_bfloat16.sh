#!/usr/bin/env bash
# LiteRT rounds the scales of blockwise int4 weights from half precision to bfloat16.
#
# In .tflite files, the scales of BlockwiseQuantization are a FLOAT16 tensor (11 significant bits). On a CPU, XNNPACK
# runs the FULLY_CONNECTED, and its blockwise kernels keep scales in bfloat16 (8 significant bits). The weights of every
# block therefore differ by up to 0.2 percent from those in the file, without any warning. Activations are also rounded
# to int8, asymmetrically and with a scale per row. A reference that rounds both agrees to 1e-6; a reference with the
# stored scales does not. A quantizer can avoid the loss by choosing scales that are exact in both formats.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ai-edge-litert==2.3.0' 'flatbuffers==25.12.19' 'numpy==2.4.6' 'ml_dtypes==0.5.3'
"$folder/venv/bin/python" - "$folder/model.tflite" 2>/dev/null <<'PY'
import importlib.metadata
import sys

import flatbuffers
import ml_dtypes
import numpy as np
from ai_edge_litert import schema_py_generated as s
from ai_edge_litert.interpreter import Interpreter

ROWS, COLUMNS, BLOCK = 16, 64, 32
random = np.random.default_rng(0)
codes = random.integers(-7, 8, (ROWS, COLUMNS), dtype=np.int8)
scales = random.uniform(0.01, 0.02, (ROWS, COLUMNS // BLOCK)).astype(np.float16)
x = random.standard_normal((1, COLUMNS)).astype(np.float32)


def buffer(data=b""):
    made = s.BufferT()
    made.data = np.frombuffer(data, np.uint8) if data else None
    return made


def tensor(name, shape, kind, place=0):
    made = s.TensorT()
    made.name, made.shape, made.type, made.buffer, made.hasRank = name, list(shape), kind, place, True
    return made


nibbles = codes.reshape(-1, 2).view(np.uint8) & 15
weight = tensor("weight", codes.shape, s.TensorType.INT4, 1)
blockwise = s.BlockwiseQuantizationT()
blockwise.scales, blockwise.zeroPoints, blockwise.blockSize = 2, -1, BLOCK
weight.quantization = s.QuantizationParametersT()
weight.quantization.detailsType = s.QuantizationDetails.BlockwiseQuantization
weight.quantization.details = blockwise

options = s.FullyConnectedOptionsT()
product = s.OperatorT()
product.inputs, product.outputs = [0, 1, -1], [3]
product.builtinOptionsType, product.builtinOptions = s.BuiltinOptions.FullyConnectedOptions, options
graph = s.SubGraphT()
graph.tensors = [
    tensor("x", x.shape, s.TensorType.FLOAT32),
    weight,
    tensor("scales", scales.shape, s.TensorType.FLOAT16, 2),
    tensor("y", (1, ROWS), s.TensorType.FLOAT32),
]
graph.inputs, graph.outputs, graph.operators = [0], [3], [product]
code = s.OperatorCodeT()
code.builtinCode = code.deprecatedBuiltinCode = s.BuiltinOperator.FULLY_CONNECTED
code.version = 12
model = s.ModelT()
model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
model.buffers = [buffer(), buffer((nibbles[:, 0] | nibbles[:, 1] << 4).tobytes()), buffer(scales.tobytes())]
builder = flatbuffers.Builder(4096)
builder.Finish(model.Pack(builder), b"TFL3")
with open(sys.argv[1], "wb") as file:
    file.write(builder.Output())

interpreter = Interpreter(sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
interpreter.set_tensor(0, x)
interpreter.invoke()
got = interpreter.get_tensor(3)

low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
step = (high - low) / 255
zero = np.clip(np.round(-128 - low / step), -128, 127)
rounded = ((np.clip(np.round(x / step) + zero, -128, 127)) - zero) * step


def error(activations, block_scales):
    values = codes * np.repeat(block_scales.astype(np.float64), BLOCK, axis=1)
    want = activations @ values.T
    return float(np.abs(got - want).max() / np.abs(want).max())


as_stored = error(rounded, scales)
as_bfloat16 = error(rounded, scales.astype(ml_dtypes.bfloat16))
float_activations = error(x, scales.astype(ml_dtypes.bfloat16))
print("ai-edge-litert", importlib.metadata.version("ai-edge-litert"))
print(f"activations rounded to int8, scales as the file has them: {as_stored:.1e} of the largest result")
print(f"activations rounded to int8, scales rounded to bfloat16:   {as_bfloat16:.1e}")
print(f"activations as they are, scales rounded to bfloat16:       {float_activations:.1e}")
sys.exit(0 if as_bfloat16 < 1e-5 and as_stored > 5e-4 and float_activations > 1e-3 else 1)
PY
