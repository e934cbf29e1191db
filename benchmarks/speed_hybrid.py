"""Speed of a hybrid model in int4: decode after a short and a long past, against transformers, on one thread.

    python benchmarks/speed_hybrid.py [--work DIR] [--rounds 5] [--long 8192] [--genai]

The checkpoint is a random Qwen3-Next of 1.0 GB in bfloat16: six layers of the gated delta rule and two of attention.
moec runs int4 weights with int8 activations; transformers runs the checkpoint in bfloat16 with eager attention. Each
decode step of one is timed beside one of the other. The last table has moec's steps after 128 and after `--long`
tokens, the time of the kernels of recurrent layers in them by ONNX Runtime's profile, which does not depend on the
past, and the bytes of the states of each kind.

With `--genai` (needs onnxruntime-genai) there is only one table, of a random Qwen3.5-MoE of the same widths: the model
that onnxruntime-genai's builder makes of it in int4, as it is and with int8 activations for the experts too, and moec's
int4, opened as it is and from packed weights (`moec pack`, which `moec run` does by itself).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from arguments import add_flags
from checkpoints import random_hybrid_checkpoint, random_qwen3_5_checkpoint
from machine import describe
from speed import STEPS, Genai, Moec, Opener, compare, cpu_ms
from speed_int4 import build_genai, expert_activations_in_int8

SHORT = 128
PROFILED = 60
ROOT = Path(__file__).resolve().parents[1]
RECURRENT = ("LinearAttention", "LinearAttentionGate", "CausalConvWithState")


class Transformers:
    """The checkpoint in transformers, in bfloat16."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="eager"
        )
        self.cache: Any = None

    def prefill(self, ids: np.ndarray) -> None:
        self.cache = None
        self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: np.ndarray) -> None:
        out = self.model(input_ids=torch.from_numpy(ids), cache=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.cache if "cache" in out else out.past_key_values


def export_int4(checkpoint: Path, directory: Path) -> Path:
    """Export with int4 experts and projections, rounded to nearest, once."""
    from moec.compiler.api import export

    if not directory.is_dir():
        section = {"format": "int4", "rounding": "rtn", "activations": "int8-dynamic"}
        export(checkpoint, target="onnx", output=directory, gates=False, quantize=section)
    return directory


def by_past(directory: Path, lengths: tuple[int, int], rounds: int) -> str:
    """A table of decode steps after pasts of different lengths, measured alternately, with the bytes of the states."""
    random, models = np.random.default_rng(0), {length: Moec(str(directory)) for length in lengths}
    for length, model in models.items():
        fill(model.runner, length)
    found: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(rounds):
        for length, model in models.items():
            ids = random.integers(3, 31999, (STEPS, 1, 1))
            found[length].append(min(cpu_ms(lambda model=model, item=item: model.decode(item)) for item in ids))
    first = statistics.median(found[lengths[0]])
    kernels = {length: recurrent_ms(directory, length) for length in lengths}
    lines = [
        "| past | decode ms | ratio | recurrent kernels ms | ratio | bytes of recurrent states | bytes of KV caches |",
        "|---|---|---|---|---|---|---|",
    ]
    for length, model in models.items():
        own = statistics.median(found[length])
        sizes = [sum(map(int, group)) for group in _state_bytes(model)]
        recurrent = f"{kernels[length]:.2f} | {kernels[length] / kernels[lengths[0]]:.2f}"
        lines.append(f"| {length} | {own:.1f} | {own / first:.2f} | {recurrent} | {sizes[0]} | {sizes[1]} |")
    return "\n".join(lines)


def fill(runner: Any, length: int) -> None:
    """Feed a prompt of random tokens, 512 at a time."""
    random = np.random.default_rng(length)
    for start in range(0, length, 512):
        step = runner.prefill if start == 0 else runner.decode
        step(random.integers(3, 31999, (1, min(512, length - start))))


def recurrent_ms(directory: Path, past: int) -> float:
    """Milliseconds of a decode step in the kernels of recurrent layers, after `past` tokens."""
    from moec.targets.onnx.runner import OnnxRunner

    runner = OnnxRunner(directory, threads=1, profile=True)
    fill(runner, past)
    for token in range(PROFILED):  # more steps than pieces of the prompt: the profile has the median of each node
        runner.decode(np.array([[token + 3]]))
    times = runner.kernel_times()
    return sum(times[kernel] for kernel in RECURRENT if kernel in times) / 1e6


def _state_bytes(model: Moec) -> tuple[list[int], list[int]]:
    """Bytes of every recurrent and convolution state, and of every key and value cache, that a runner holds."""
    states = {name: model.runner._states.current(name).nbytes for name in model.runner._states.presents}
    recurrent = [size for name, size in states.items() if "conv" in name or "recurrent" in name]
    return recurrent, [size for name, size in states.items() if name.endswith((".key", ".value"))]


def beside_genai(work: Path) -> dict[str, Opener]:
    """Qwen3.5-MoE in onnxruntime-genai and in moec, in the order of the table."""
    from moec.compiler.run.packing import pack_into

    checkpoint = random_qwen3_5_checkpoint(work / "qwen3.5-1gb", ROOT / "golden_models" / "olmoe-tiny")
    built = build_genai(checkpoint, work / "qwen3.5-genai")
    rounded = expert_activations_in_int8(built, work / "qwen3.5-genai-int8")
    artifact, packed = export_int4(checkpoint, work / "qwen3.5-int4"), work / "qwen3.5-packed"
    if not packed.is_dir():
        pack_into(artifact, packed, lambda *_: None)
    return {
        "onnxruntime-genai int4, as its builder makes it": partial(Genai, str(built)),
        "onnxruntime-genai int4, int8 activations for experts": partial(Genai, str(rounded)),
        "moec int4": partial(Moec, str(artifact)),
        "moec int4, packed": partial(Moec, str(packed)),
    }


def beside_transformers(work: Path, rounds: int, long: int) -> None:
    """Qwen3-Next in transformers and in moec, and moec after a short and a long past."""
    checkpoint = random_hybrid_checkpoint(work / "qwen3-next-1gb")
    artifact = export_int4(checkpoint, work / "qwen3-next-int4")
    compare(
        {"transformers, bfloat16": partial(Transformers, checkpoint), "moec int4": partial(Moec, str(artifact))}, rounds
    )
    print(f"\n{describe()}\n")
    print(by_past(artifact, (SHORT, long), rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory that keeps checkpoints and artifacts")
    parser.add_argument("--genai", action="store_true", help="compare with onnxruntime-genai")
    add_flags(parser, rounds=5, long=8192)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.genai:
            compare(beside_genai(work), options.rounds)
        else:
            beside_transformers(work, options.rounds, options.long)


if __name__ == "__main__":
    main()
