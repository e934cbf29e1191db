"""Error of `moec estimate` for decode, on shapes other than those that calibrated it.

    python benchmarks/estimate_error.py [--quantize none int8 int4] [--target onnx]

Random checkpoints of the shapes below are built, their decode steps are measured on one thread, and each is compared
with the estimate. The first run for a format calibrates the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from moec.compiler.build.estimate import EstimateRequest, count_program
from moec.compiler.build.estimate_calibration import measure_decode, speeds, write_random

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

SHAPES = (
    {"hidden_size": 512, "layers": 6, "heads": 8, "experts": 24, "top_k": 4, "width": 384, "vocab_size": 8000},
    {"hidden_size": 768, "layers": 4, "heads": 12, "experts": 16, "top_k": 2, "width": 768, "vocab_size": 12000},
    {"hidden_size": 384, "layers": 8, "heads": 6, "experts": 32, "top_k": 8, "width": 256, "vocab_size": 4000},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--target", default="onnx")
    options = parser.parse_args()
    print(describe(), flush=True)
    print("\n| format | shape | context | measured ms | estimated ms | error |\n|---|---|---|---|---|---|")
    for quantize in options.quantize:
        for shape in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = write_random(Path(folder) / "model", shape)
                _, formats = count_program(EstimateRequest(str(checkpoint), options.target, quantize))
                fitted = speeds(options.target, "fp32", formats, lambda *_: None)
                assert fitted is not None
                measured = measure_decode(checkpoint, Path(folder) / "out", options.target, "fp32", quantize)
            name = " ".join(f"{key} {value}" for key, value in shape.items())
            for counts, context, seconds in measured:
                estimated = fitted.decode(counts, context)
                cells = (quantize, name, context, f"{seconds * 1e3:.2f}", f"{estimated * 1e3:.2f}")
                print(f"| {' | '.join(map(str, cells))} | {estimated / seconds - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
