"""What lm_head loses in 4 bits, rounded to nearest and by GPTQ: `python benchmarks/head_formats.py [CHECKPOINT]`.

Every row is an ONNX artifact of a golden model that was exported through the API without gates, and is compared with
the float model on held-out texts: windows of 256 tokens. First lm_head alone is quantized, then all weights, with
different heads. The texts are those of golden_models/olmoe-tiny; the tokenizer is that of the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec import passes
from moec.compiler.api import export
from moec.compiler.common import markdown
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.text.corpus import spread, tokenize, windows
from moec.compiler.text.perplexity import compare
from moec.targets import get_target

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "golden_models"
LENGTH = 256
TEXTS = ("python", "austen", "kjv")
REST = dict.fromkeys(("experts_gate_up", "experts_down", "shared_expert", "attention"), "int4") | {"embedding": "int8"}
HEADS = (("int8", "rtn"), ("int4:32", "rtn"), ("int4:32", "gptq"), ("int4:32:asym", "gptq"))
"""Formats of lm_head, and how weights of 4 bits are rounded."""


def rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What is quantized, the head, and the section `quantize` of the recipe."""
    for head, rounding in HEADS:
        how = {"rtn": "nearest", "gptq": "GPTQ"}[rounding]
        yield "head", f"{head}, {how}", {"format": {"formats": {"lm_head": head}}, "rounding": rounding}
    for head in dict.fromkeys(head for head, _ in HEADS):
        yield "all, GPTQ", head, {"format": {"formats": REST | {"lm_head": head}}, "rounding": "gptq"}


def measure(checkpoint: Path, source: ProgramRunner, section: dict[str, Any], count: int) -> list[str]:
    """Megabytes of the artifact, KL divergence in nats per token, and agreement of the most likely token."""
    divergences, agreements = [], []
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work) / "artifact"
        export(checkpoint, target="onnx", output=directory, gates=False, quantize=section)
        size = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
        runner = get_target("onnx").open(directory, threads=1)
        for text in TEXTS:
            path = GOLDEN / "olmoe-tiny" / "texts" / f"heldout_{text}.txt"
            ids = tokenize(checkpoint, path.read_text(encoding="utf-8"))
            judged = compare(source, runner, spread(windows(ids, LENGTH), count))
            divergences.append(judged.divergences.mean())
            agreements.append(judged.agreement)
    return [f"{size / 1e6:.2f}", f"{np.mean(divergences):.1e}", f"{np.mean(agreements):.1%}"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=GOLDEN / "olmoe-tiny")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    program, _ = passes.run_passes(capture(Checkpoint.open(str(options.checkpoint))), passes.default_passes())
    source = ProgramRunner(program)
    cells = [
        [what, head, *measure(options.checkpoint, source, section, options.windows)] for what, head, section in rows()
    ]
    print(markdown.table(["quantized", "head", "MB", "KL", "top-1"], cells))
    print(f"\n{describe()}.")


if __name__ == "__main__":
    main()
