"""A KV cache in int8 against one in float32: what it loses, its memory, and the time of a decode step.

    python benchmarks/kv_cache.py [--work DIR] [--rounds 5] [-o docs/quantization.md]

Loss is measured on the golden models with held-out texts, windows of 1024 tokens in one step, against the float32
artifact of the same flavor. Time is measured on a random OLMoE of 0.27 GB in bfloat16 (hidden 1024, 2 layers, 32
experts, top-8) in int4: the two artifacts decode in alternation after the same number of tokens, process CPU time.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.api import export
from moec.compiler.common import markdown
from moec.compiler.common.artifact import read_manifest
from moec.compiler.text.corpus import spread, tokenize, windows
from moec.compiler.text.perplexity import compare
from moec.targets import get_target
from moec.targets.runners import Runner

sys.path.insert(0, str(Path(__file__).parent))
import pages
from checkpoints import random_checkpoint
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "golden_models"
TEXTS = ("python", "austen", "kjv")
LENGTH, WINDOWS = 1024, 8
PASTS, PROMPT = (128, 512, 2048), 512
STEPS = 24
LAYERS = 2


def built(checkpoint: Path, directory: Path, **quantize: Any) -> Path:
    """An artifact of the flavor whose caches are written in place, made once."""
    if not directory.is_dir():
        export(checkpoint, target="onnx", output=directory, flavor="genai", quantize=quantize, gates=False)
    return directory


def opened(directory: Path) -> Runner:
    """A runner on one thread."""
    return get_target("onnx").open(directory, threads=1)


def losses(work: Path) -> str:
    """Perplexity, divergence and agreement of the golden models."""
    rows = []
    for name in ("olmoe-tiny", "qwen3-next-tiny"):
        plain = opened(built(GOLDEN / name, work / f"{name}-float", format="none"))
        found = opened(built(GOLDEN / name, work / f"{name}-int8", kv_cache="int8"))
        texts = {}
        for text in TEXTS:
            ids = tokenize(GOLDEN / name, (GOLDEN / "olmoe-tiny" / "texts" / f"heldout_{text}.txt").read_text())
            texts[text] = compare(plain, found, spread(windows(ids, LENGTH), WINDOWS))
        increases = [np.expm1((judged.candidate - judged.reference).mean()) for judged in texts.values()]
        divergence = np.mean([judged.divergences.mean() for judged in texts.values()])
        agreement = np.mean([judged.agreement for judged in texts.values()])
        rows.append([name, *(f"{value:+.3%}" for value in increases), f"{divergence:.1e}", f"{agreement:.1%}"])
    return markdown.table(["model", *(f"perplexity, {text}" for text in TEXTS), "KL", "top-1"], rows)


def speeds(work: Path, rounds: int) -> str:
    """Bytes of the cache per token, and CPU time of a decode step after several pasts and of a prompt."""
    checkpoint = random_checkpoint(work / "random", num_hidden_layers=LAYERS)
    shutil.copy(GOLDEN / "olmoe-tiny" / "tokenizer.json", checkpoint)
    little = {"format": "int4", "rounding": "rtn", "windows": 4, "window": 128}
    directories = [built(checkpoint, work / f"random-{cache}", **little, kv_cache=cache) for cache in ("float", "int8")]
    sizes = [read_manifest(each)["model"]["states"]["bytes_per_token"] for each in directories]
    runners = [opened(each) for each in directories]
    ids = np.random.default_rng(0).integers(3, 2000, (1, max(PASTS)))
    rows = [["cache, bytes per token", *map(str, sizes), f"{sizes[1] / sizes[0]:.2f}"]]
    for past in PASTS:
        for runner in runners:
            runner.prefill(ids[:, :past])
        spent = alternated([lambda runner=runner: runner.decode(ids[:, :1]) for runner in runners], rounds * STEPS)
        rows.append([f"decode after {past} tokens, ms", *cells(spent)])
    spent = alternated([lambda runner=runner: runner.prefill(ids[:, :PROMPT]) for runner in runners], rounds)
    rows.append([f"prefill of {PROMPT} tokens, ms", *cells(spent)])
    return markdown.table(["", "float32", "int8", "ratio"], rows)


def alternated(runs: list[Any], rounds: int) -> list[float]:
    """Median CPU milliseconds of each of `runs`, in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, times, strict=True):
            started = time.process_time()
            run()
            own.append(1e3 * (time.process_time() - started))
    return [statistics.median(own) for own in times]


def cells(spent: list[float]) -> list[str]:
    """Both times and their ratio."""
    first, second = spent
    return [f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for checkpoints and artifacts, which are made once")
    parser.add_argument("--rounds", type=int, default=5, help="prompts, and groups of decode steps, of each artifact")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "quantization.md", help="page to update")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        text = f"{losses(work)}\n\n{speeds(work, arguments.rounds)}\n\n{describe()}."
    print(text)
    pages.put(text, arguments.output, name="kv-cache")


if __name__ == "__main__":
    main()
