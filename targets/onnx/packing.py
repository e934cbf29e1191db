"""Writes a model with its weights as the kernels of this machine read them, which ONNX Runtime then maps into memory.

`QMoE`, `MatMulNBits` and `MatMul` pack their constant weights when a model is opened, into private memory. ONNX Runtime
can write what it packed beside the original weights. When it opens that model it packs each tensor once more, compares
a digest, and takes the stored copy, whose pages it maps. So a file of another processor or version does no harm: the
digests differ and the weights are private memory again. The original weights must be there for this; they are read when
a model is opened and never again.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from moec.compiler.common.errors import ArtifactError
from moec.targets.onnx.files import MODEL, data_name
from moec.targets.onnx.runner import OnnxRunner, session_options

SMALLEST = 1024
"""Bytes from which a constant is stored in the data file and not in the graph."""


def pack(directory: Path, output: Path) -> OnnxRunner:
    """Write `model.onnx` and its data file into `output`.

    Args:
        directory: The artifact.
        output: An empty directory.

    Returns:
        A runner of the artifact's own weights, on one thread.

    Raises:
        ArtifactError: ONNX Runtime cannot load the model, or cannot write the packed one.
    """
    options = session_options(1)
    options.optimized_model_filepath = str(output / MODEL)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": data_name(MODEL, 0),
        "session.optimized_model_external_initializers_min_size_in_bytes": str(SMALLEST),
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(key, value)
    runner = OnnxRunner(directory, threads=1, options=options)
    if not (output / MODEL).is_file():
        raise ArtifactError(f"{directory}: ONNX Runtime {ort.__version__} did not write the packed model")
    return runner
