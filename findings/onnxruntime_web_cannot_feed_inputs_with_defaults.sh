#!/usr/bin/env bash
# ONNX Runtime web cannot feed an input that has a default, which ONNX Runtime's other bindings can.
#
# In ONNX, an initializer with the name of an input is that input's default (since IR version 4 an initializer need not
# be one). ONNX Runtime calls such inputs overridable initializers: a session runs without them, and Python and C feed
# them like any other input. A session of onnxruntime-web knows only the required inputs by name, and refuses to be fed
# with others, so a threshold or a scale with a default cannot be changed in a browser. Taking the initializer out of the
# graph makes the input required.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'onnx==1.23.2' 'onnxruntime==1.32.0'
npm install --silent --ignore-scripts --prefix "$folder" onnxruntime-web@1.30.0
"$folder/venv/bin/python" - "$folder/model.onnx" <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2]), ("scale", []))]
outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])]
default = numpy_helper.from_array(np.asarray(2, np.float32), "scale")
graph = helper.make_graph([helper.make_node("Mul", ["x", "scale"], ["y"])], "g", inputs, outputs, [default])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.save(model, sys.argv[1])
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
x = np.float32([1, 2])
found = [session.run(None, feeds)[0].tolist() for feeds in ({"x": x}, {"x": x, "scale": np.asarray(3, np.float32)})]
print("onnxruntime", ort.__version__, "| default:", found[0], "| scale 3:", found[1])
sys.exit(0 if found == [[2, 4], [3, 6]] else 1)
PY
cat >"$folder/run.mjs" <<'JS'
import { readFileSync } from "node:fs";

import * as ort from "onnxruntime-web";

const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(process.argv[2])));
const x = new ort.Tensor("float32", Float32Array.of(1, 2), [2]);
const scale = new ort.Tensor("float32", Float32Array.of(3), []);
const { y } = await session.run({ x });
const error = await session.run({ x, scale }).then(
  () => "",
  (reason) => reason.message,
);
console.log("onnxruntime-web", ort.env.versions.web, "| inputs:", session.inputNames, "| default:", Array.from(y.data), "| scale 3:", error || "no error");
process.exit(error.includes("invalid input 'scale'") && session.inputNames.join() === "x" ? 0 : 1);
JS
node "$folder/run.mjs" "$folder/model.onnx"
