#!/usr/bin/env bash
# ONNX Runtime's session option `session.set_denormal_as_zero` changes Python's own floats, for good.
#
# On x86 the option sets flush-to-zero and denormals-are-zero. It sets them in the threads of the session, and also in
# the thread that creates the first session of a process with it, which here is Python's main thread, and nothing takes
# them back: neither the end of a run nor the deletion of the session. From then on 1e-308 * 0.1 is 0.0 in that thread
# and in the threads that it starts, in NumPy too, and a denormal number that was computed before is printed as 0.0.
# Whoever sets the option from Python should save the floating-point environment of the thread before and restore it.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'onnxruntime==1.32.0' 'onnx==1.23.2' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import gc
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

if platform.machine() != "x86_64":
    sys.exit("the option has an effect on x86 only")


def small() -> str:
    """A denormal product, of numbers that no compiler folds; as text, since such a number is printed as 0.0 later."""
    return repr(float("1e-308") * float("0.1"))


def session(*, flush: bool) -> ort.InferenceSession:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.set_denormal_as_zero", "1" if flush else "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


before = small()
opened = session(flush=True)
after_opening = small()
opened.run(None, {"x": np.ones(4, np.float32)})
del opened
gc.collect()
after_deleting = small()
array = repr(float((np.array([1e-308]) * 0.1)[0]))
with ThreadPoolExecutor(1) as pool:
    in_another_thread = pool.submit(small).result()
print("onnxruntime", ort.__version__, "onnx", onnx.__version__)
print("1e-308 * 0.1 before any session:", before)
print("after a session is opened:", after_opening)
print("after it is deleted:", after_deleting, "in NumPy:", array)
print("in a thread that is started then:", in_another_thread)
same = [before, after_opening, after_deleting, array] == ["1e-309", "0.0", "0.0", "0.0"]
sys.exit(0 if same and in_another_thread == "0.0" else 1)
PY
