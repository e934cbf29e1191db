"""Export the golden model, print the verdicts and continue a text."""

import tempfile
from pathlib import Path

import moec

CHECKPOINT = Path(__file__).resolve().parents[1] / "golden_models" / "olmoe-tiny"

with tempfile.TemporaryDirectory() as directory:
    result = moec.export(CHECKPOINT, target="onnx", output=Path(directory) / "out")
    for verdict in result.verdicts:
        print(f"{verdict.gate:18} {verdict.status}: {verdict.summary}")
    print(moec.load(result.directory).generate("The list of arguments is", max_new_tokens=24))
