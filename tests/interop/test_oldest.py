"""The oldest releases of transformers and onnxruntime that moec allows, in an environment of their own.

`make test` runs with the newest ones. What differs between the two is where moec meets them: capture, adapters, the
weights of released checkpoints, and the golden model on ONNX Runtime.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.environments import environment, lines

pytestmark = pytest.mark.interop
TESTS = (
    "tests/compiler/frontend/test_capture.py",
    "tests/compiler/frontend/test_adapters.py",
    "tests/compiler/frontend/stored",
    "tests/targets/onnx/test_golden.py",
    "tests/targets/onnx/test_moe.py",
    "tests/targets/onnx/test_quantized.py",
)


def test_capture_and_onnx(pytestconfig: pytest.Config) -> None:
    python = environment("oldest", lines(Path(__file__).with_name("oldest-requirements.txt")))
    versions = "import transformers, onnxruntime; print(transformers.__version__, onnxruntime.__version__)"
    found = subprocess.run([python, "-c", versions], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["5.23.0", "1.31.1"]
    command = [python, "-m", "pytest", "-q", "-m", "not slow and not interop and not gpu", *TESTS]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0
