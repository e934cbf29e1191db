"""Write an OLMoE checkpoint in float32 as a GGUF file, and let llama.cpp quantize it.

python write_gguf.py CHECKPOINT OUTPUT EXPERTS_USED [FTYPE]

EXPERTS_USED is that of the checkpoint in a right file. FTYPE is a number of llama.cpp's llama_ftype: 2 is Q4_0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gguf_files import quantize, write_olmoe

if __name__ == "__main__":
    checkpoint, output = map(Path, sys.argv[1:3])
    write_olmoe(
        checkpoint,
        output,
        lambda _, values: (values.astype(np.float32), None),
        framework="numpy",
        experts_used=int(sys.argv[3]),
    )
    if len(sys.argv) > 4:
        quantized = output.with_suffix(".quantized")
        quantize(output, quantized, int(sys.argv[4]))
        quantized.replace(output)
