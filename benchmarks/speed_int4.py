"""int4 decode and prefill against onnxruntime-genai, one thread, in alternation: one command makes and measures all.

    python benchmarks/speed_int4.py [--work DIR] [--rounds 7]

Random checkpoints of equal widths (1.004 GB in bfloat16): OLMoE for moec, LFM2-MoE for onnxruntime-genai, whose builder
lacks OLMoE. Both run int4 weights with int8 activations: the builder sets that for linears alone, so its QMoE nodes get
`accuracy_level` 4 afterwards. The peer has 4 bits in blocks of 32 everywhere, our preset blocks of 128 and a head
of 8 bits, and the last row has the formats of the peer.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import random_checkpoint, random_lfm2_checkpoint
from speed import Genai, Model, Moec, compare

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("experts_gate_up", "experts_down", "attention", "embedding", "lm_head")
ROWS: dict[str, Any] = {
    "moec int4": "int4",
    "moec int4:32 in all classes": {"formats": dict.fromkeys(CLASSES, "int4:32")},
}


def build_ours(checkpoint: Path, directory: Path, chosen: Any) -> Path:
    """Export with weights rounded to nearest (once)."""
    from moec.compiler.api import export

    if not directory.is_dir():
        section = {"format": chosen, "rounding": "rtn", "activations": "int8-dynamic"}
        export(checkpoint, target="onnx", output=directory, gates=False, quantize=section)
    return directory


def build_genai(checkpoint: Path, directory: Path) -> Path:
    """Run onnxruntime-genai's builder (once) and let QMoE round its activations too."""
    import onnx

    if not directory.is_dir():
        made = directory.with_suffix(".partial")
        shutil.rmtree(made, ignore_errors=True)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(checkpoint), "-o", str(made)]
        extra = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4"]
        subprocess.run([*command, *extra], check=True, capture_output=True)
        model = onnx.load(made / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "QMoE":
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
        onnx.save(model, made / "model.onnx")
        made.rename(directory)
    return directory


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where to keep checkpoints and artifacts")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        peer = random_lfm2_checkpoint(work / "lfm2-1gb", ROOT / "golden_models" / "olmoe-tiny")
        models: dict[str, Model] = {"onnxruntime-genai int4": Genai(str(build_genai(peer, work / "genai-int4")))}
        checkpoint = random_checkpoint(work / "olmoe-1gb")
        for name, chosen in ROWS.items():
            directory = work / name.replace(" ", "-").replace(":", "-")
            models[name] = Moec(str(build_ours(checkpoint, directory, chosen)))
        compare(models, options.rounds)


if __name__ == "__main__":
    main()
