"""Speed of int4 decode and prefill compared with onnxruntime-genai: builds and measures all models.

    python benchmarks/speed_int4.py [--work DIR] [--rounds 7] [--openings 1] [--threads 1] [--only TEXT] [--llama-cpp]

Checkpoints are random, of equal widths (1.004 GB in bfloat16): OLMoE for moec, and LFM2-MoE for onnxruntime-genai,
whose builder does not support OLMoE. Both run int4 weights with int8 activations. The builder sets int8 activations for
linears only, so its QMoE nodes are set to `accuracy_level` 4 afterwards. onnxruntime-genai has 4 bits in blocks of 32
for all weights; moec's preset has blocks of 128 and 8 bits for lm_head; other rows have 4 bits for all weights. "Cache
in place" is the flavor whose KV caches are buffers that a step writes into, as in onnxruntime-genai; both moec's runner
and onnxruntime-genai can run it. "Half of the slots" is dynamic routing by top-p with a budget of 0.5; its router is
random, as are the tokens. A prompt is fed for the logits of its last token by moec, by llama.cpp, and by
onnxruntime-genai where its builder was told to (`prune_lm_head`); otherwise it computes all.

With `--llama-cpp` (needs llama-cpp-python and gguf), the same OLMoE is measured as Q4_0, quantized by llama.cpp, with
lm_head in Q6_K; llama.cpp also rounds activations to int8.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import random_checkpoint, random_lfm2_checkpoint
from gguf_files import is_float, write_olmoe
from routing_latency import mass_for
from speed import Genai, LlamaCpp, Model, Moec, Opener, compare

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("experts_gate_up", "experts_down", "attention", "embedding", "lm_head")
ALL_128, ALL_32 = ({"formats": dict.fromkeys(CLASSES, form)} for form in ("int4:128", "int4:32"))
PROMPTS = (128, 512)
BUDGET = 0.5


@dataclass(frozen=True)
class Row:
    """A row of moec: its format and flavor, whether weights are packed, whether half of the slots are dropped."""

    format: Any
    flavor: str = "default"
    runtime: type[Model] = Moec
    packed: bool = False
    halved: bool = False

    @property
    def directory(self) -> str:
        """Name of the artifact's directory; rows of one artifact share it."""
        kind = self.format if isinstance(self.format, str) else "-".join(sorted(set(self.format["formats"].values())))
        return "-".join(["moec", kind.replace(":", "-"), self.flavor, *(["halved"] if self.halved else [])])


ROWS: dict[str, Row] = {
    "moec int4": Row("int4"),
    "moec int4, packed": Row("int4", packed=True),
    "moec int4, half of the slots": Row("int4", halved=True),
    "moec int4, cache in place": Row("int4", "genai"),
    "moec int4, cache in place, packed": Row("int4", "genai", packed=True),
    "moec int4:128 in all classes": Row(ALL_128),
    "moec int4:128 in all classes, cache in place": Row(ALL_128, "genai"),
    "moec int4:128 in all classes, cache in place, half of the slots": Row(ALL_128, "genai", halved=True),
    "moec int4:128 in all classes, in onnxruntime-genai": Row(ALL_128, "genai", Genai),
    "moec int4:32 in all classes": Row(ALL_32),
}


def build_moec(checkpoint: Path, directory: Path, row: Row) -> Path:
    """Export with weights rounded to nearest, once; and pack, once."""
    from moec.compiler.api import export
    from moec.compiler.run.packing import pack_into

    if not directory.is_dir():
        chosen: dict[str, Any] = {"quantize": {"format": row.format, "rounding": "rtn"}}
        if row.halved:
            mass, kept = mass_for(checkpoint, BUDGET)
            print(f"top-p {mass:.3f} keeps {kept:.1%} of the slots")
            chosen["routing"] = {"policy": "top-p", "parameters": {"mass": mass}}
        options = {"flavor": row.flavor}
        export(checkpoint, target="onnx", output=directory, gates=False, options=options, **chosen)
    packed = directory.with_name(f"{directory.name}-packed")
    if row.packed and not packed.is_dir():
        pack_into(directory, packed, lambda *_: None)
    return packed if row.packed else directory


def build_genai(checkpoint: Path, directory: Path, *options: str) -> Path:
    """Run onnxruntime-genai's builder, once, with int8 activations, which it does not set for the experts."""
    if not directory.is_dir():
        made = directory.with_suffix(".partial")
        shutil.rmtree(made, ignore_errors=True)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(checkpoint), "-o", str(made)]
        extra = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4", *options]
        subprocess.run([*command, *extra], check=True, capture_output=True)
        made.rename(directory)
    return directory


def expert_activations_in_int8(built: Path, directory: Path) -> Path:
    """A copy of a model that onnxruntime-genai's builder made (once), with int8 activations for QMoE too."""
    import onnx

    if not directory.is_dir():
        shutil.copytree(built, directory, copy_function=os.link)
        model = onnx.load(built / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "QMoE":
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
        (directory / "model.onnx").unlink()
        onnx.save(model, directory / "model.onnx")
    return directory


def build_llama_cpp(checkpoint: Path, file: Path) -> Path:
    """Write the checkpoint as GGUF without a vocabulary and quantize it with llama.cpp, once."""
    if file.is_file():
        return file
    import llama_cpp

    whole, partial = file.with_suffix(".f16"), file.with_suffix(".partial")
    write_olmoe(checkpoint, whole, in_half_precision)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    assert llama_cpp.llama_model_quantize(str(whole).encode(), str(partial).encode(), settings) == 0
    whole.unlink()
    partial.rename(file)
    return file


def in_half_precision(name: str, values: torch.Tensor) -> tuple[Any, None]:
    """Vectors and routers in float32, other tensors in float16."""
    return (values.float() if is_float(name, values) else values.half()).numpy(), None


def openers_of(work: Path, threads: int, *, llama_cpp: bool) -> dict[str, Callable[[], Opener]]:
    """What builds each row, once, and returns how to open it."""
    found: dict[str, Callable[[], Opener]] = {}
    checkpoint = random_checkpoint(work / "olmoe-1gb")

    def peer(*options: str) -> Opener:
        source = random_lfm2_checkpoint(work / "lfm2-1gb", ROOT / "golden_models" / "olmoe-tiny")
        name = "-".join(["genai", *(option.partition("=")[0] for option in options)])
        built = build_genai(source, work / f"{name}-built", *options)
        return partial(Genai, str(expert_activations_in_int8(built, work / f"{name}-int4")), threads)

    def own(row: Row) -> Opener:
        return partial(row.runtime, str(build_moec(checkpoint, work / row.directory, row)), threads)

    found["onnxruntime-genai int4"] = peer
    found["onnxruntime-genai int4, logits of the last token"] = partial(peer, "prune_lm_head=true")
    found |= {name: partial(own, row) for name, row in ROWS.items()}
    if llama_cpp:
        found["llama.cpp Q4_0"] = lambda: partial(
            LlamaCpp, str(build_llama_cpp(checkpoint, work / "olmoe-1gb-q4_0.gguf")), threads
        )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where to keep checkpoints and artifacts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--openings", type=int, default=1, help="how often all models are opened anew")
    parser.add_argument("--threads", type=int, default=1, help="with several, wall-clock time is measured")
    parser.add_argument("--only", default="", help="measure only rows whose name matches this regular expression")
    parser.add_argument("--llama-cpp", action="store_true", help="measure llama.cpp too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = openers_of(options.work or Path(temporary), options.threads, llama_cpp=options.llama_cpp)
        chosen = {name: build() for name, build in rows.items() if re.search(options.only, name)}
        compare(chosen, options.rounds, prompts=PROMPTS, openings=options.openings, threads=options.threads)


if __name__ == "__main__":
    main()
