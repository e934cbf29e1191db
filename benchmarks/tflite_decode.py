"""Decoding on LiteRT with all experts of a token and with half of them, measured alternately.

    python benchmarks/tflite_decode.py [--random] [--context 128] [--threads 1] [--rounds 20]

The model is the golden model or, with `--random`, the random OLMoE of 1.0 GB in int8 (see checkpoints.py), whose shape
is more typical: experts are most of the weights that a token reads. Times are CPU time of the process, which depends
less on other processes. "half" is the policy uniform-k with half of the experts of each token, a budget of exactly 0.5.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from arguments import add_flags
from checkpoints import random_checkpoint
from machine import describe

from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.passes import default_passes, run_passes
from moec.passes.quantize import Quantize
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.uniform_k import UniformK
from moec.quantize.formats import parse_format
from moec.quantize.plan import QuantizationPlan, TensorClass
from moec.targets.tflite import lower
from moec.targets.tflite.runner import TfliteRunner
from moec.targets.tflite.writer import write

GOLDEN = Path(__file__).resolve().parents[1] / "golden_models" / "olmoe-tiny"
TOKENS = 16


FORMS = ("none", "int8:channel:int8-dynamic")


def programs(captured: Program, form: str) -> dict[str, Program]:
    classes = (TensorClass.EXPERTS_GATE_UP, TensorClass.EXPERTS_DOWN, TensorClass.ATTENTION, TensorClass.LM_HEAD)
    plan = QuantizationPlan.build({name: parse_format(form) for name in classes})
    whole, _ = run_passes(captured, [*default_passes(), Quantize(plan=plan)])
    policy = UniformK(k=captured.layers[0].top_k // 2)
    half, _ = run_passes(captured, [*default_passes(), DynamicRouting(policy=policy), Quantize(plan=plan)])
    return {"all": whole, "half": half}


def opened(program: Program, file: Path, options: argparse.Namespace) -> TfliteRunner:
    model, _ = lower.build(program, lengths=(1,), capacity=options.context, branches=True)
    write(model, file, lambda *_: None)
    return TfliteRunner(file, threads=options.threads)


def seconds(runner: TfliteRunner, ids: np.ndarray) -> list[float]:
    runner.reset()
    found = []
    for token in ids:
        start = time.process_time()
        runner.decode(token[None, None])
        found.append(time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="the random OLMoE of 1.0 GB in int8")
    add_flags(parser, context=128, threads=1, rounds=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        checkpoint = random_checkpoint(Path(work) / "olmoe-1gb") if options.random else GOLDEN
        compare(capture(Checkpoint.open(str(checkpoint))), options)


def compare(captured: Program, options: argparse.Namespace) -> None:
    """Measure and print a table."""
    ids = np.random.default_rng(0).integers(0, captured.vocab_size, TOKENS)
    print(describe())
    print(
        "\n| weights | experts | median CPU ms | fastest CPU ms | median of the pairs' ratio |\n|---|---|---|---|---|"
    )
    for form in FORMS[1:] if options.random else FORMS:
        with tempfile.TemporaryDirectory() as folder:
            made = programs(captured, form).items()
            runners = {name: opened(program, Path(folder) / f"{name}.tflite", options) for name, program in made}
            times: dict[str, list[float]] = {name: [] for name in runners}
            for _ in range(options.rounds):
                for name, runner in runners.items():
                    times[name] += seconds(runner, ids)
        ratio = np.median(np.array(times["half"]) / np.array(times["all"]))
        for name, found in times.items():
            shown = f"{ratio:.2f}" if name == "half" else ""
            print(f"| {form} | {name} | {1e3 * float(np.median(found)):.3f} | {1e3 * min(found):.3f} | {shown} |")


if __name__ == "__main__":
    main()
