"""Power of the latency gate: how often it detects an artificial slow-down, and how often it passes an equal artifact.

    python benchmarks/latency_power.py ARTIFACT [--runs 20] [--slow-down 0.15] [--load 1] [--record FILE]

ARTIFACT is a moec artifact of the ONNX target. A copy of it gets extra work: a chain of matrix products on the token
ids, whose result times zero is added to the logits. Every run is the whole gate, with `--latency-baseline` set to the
unchanged artifact and `--max-regression 5%`. `--load` busy single-threaded processes run at the same time, also while
the amount of extra work is adjusted by CPU time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import psutil

from moec.compiler.common.artifact import MANIFEST, REPORTS, read_manifest, write_manifest
from moec.compiler.gates.latency import LatencyOptions, judge_latency
from moec.compiler.gates.run import exit_code
from moec.compiler.measure.latency.sampling import STEPS, timed
from moec.targets import get_target

sys.path.insert(0, str(Path(__file__).parent))
from arguments import add_flags
from machine import describe

WIDTH = 96
UNIT = 1e-7
"""Unit of the integers in a record, in seconds."""


def plant(source: Path, output: Path, products: int) -> Path:
    """Copy an artifact and add `products` matrix products of [WIDTH, WIDTH] to its graph."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(source, output, ignore=shutil.ignore_patterns(*REPORTS))
    model = ir.load(output / "model.onnx")
    graph = model.graph
    random = np.random.default_rng(0)
    weight = ir.Value(name="planted.weight", const_value=ir.tensor(random.standard_normal((WIDTH, WIDTH)).astype("f4")))
    zero = ir.Value(name="planted.zero", const_value=ir.tensor(np.float32(0)))
    for value in (weight, zero):
        value.name = value.const_value.name = value.name
        graph.register_initializer(value)
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    logits = next(value for value in graph.outputs if value.name == "logits")
    nodes = [ir.node("Cast", [ids], {"to": ir.DataType.FLOAT}), None]
    total = ir.node("ReduceMax", nodes[0].outputs, {"keepdims": 0})
    nodes[1] = total
    current = ir.node("Mul", [weight, total.outputs[0]])
    nodes.append(current)
    for _ in range(products):
        product = ir.node("MatMul", [current.outputs[0], weight])
        # Sigmoid keeps the values finite, since infinity times zero is NaN.
        current = ir.node("Sigmoid", product.outputs)
        nodes += [product, current]
    nothing = ir.node("ReduceMax", current.outputs, {"keepdims": 0})
    scaled = ir.node("Mul", [nothing.outputs[0], zero])
    added = ir.node("Add", [logits, scaled.outputs[0]])
    graph.extend([*nodes, nothing, scaled, added])
    added.outputs[0].name, added.outputs[0].shape, added.outputs[0].type = "logits", logits.shape, logits.type
    logits.name = "planted.logits"
    graph.outputs[list(graph.outputs).index(logits)] = added.outputs[0]
    ir.save(model, output / "model.onnx", external_data=None)
    content = {k: v for k, v in read_manifest(output).items() if k not in ("schema_version", "files", "digest")}
    (output / MANIFEST).unlink()
    write_manifest(output, content)
    return output


def decode_seconds(directories: list[Path], rounds: int = 60) -> list[float]:
    """CPU seconds of a decode step at 128 tokens for each artifact, measured alternately."""
    runners = [get_target("onnx").open(path, threads=1) for path in directories]
    found: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds):
        for runner, times in zip(runners, found, strict=True):
            if turn % 15 == 0:
                runner.prefill(np.ones((1, 128), np.int64))
            times.append(min(timed(lambda runner=runner: runner.decode(np.ones((1, 1), np.int64))).cpu for _ in "123"))
    return [statistics.median(times) for times in found]


def planted(source: Path, output: Path, slow_down: float) -> tuple[Path, float]:
    """An artifact whose decode takes about `1 + slow_down` times as long, and the measured slow-down."""
    products, found = 100, 0.0
    for _ in range(4):
        plant(source, output, products)
        plain, slowed = decode_seconds([source, output])
        found = slowed / plain - 1
        if abs(found - slow_down) < 0.01:
            break
        products = max(1, round(products * slow_down / max(found, 0.01)))
    return output, found


def compact(samples: Mapping[str, Any]) -> dict[str, Any]:
    """The median of every turn, by workload, artifact, clock and session, as integer multiples of `UNIT`."""
    found: dict[str, Any] = {}
    for workload, by_clock in samples.items():
        calls = STEPS if workload.startswith("decode") else 1
        found[workload] = {
            artifact: {
                clock: [
                    [round(statistics.median(session[at : at + calls]) / UNIT) for at in range(0, len(session), calls)]
                    for session in sessions
                ]
                for clock, sessions in by_artifact.items()
            }
            for artifact, by_artifact in by_clock.items()
        }
    return found


def burn() -> None:
    values = np.random.default_rng(0).standard_normal((256, 256))
    while True:
        values @ values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    add_flags(parser, runs=20, slow_down=0.15, load=1, seconds=120.0, context=128, work=Path("power-out"))
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    print(describe(), flush=True)
    # Otherwise matrix libraries would start a thread on every core.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    load = [multiprocessing.get_context("spawn").Process(target=burn, daemon=True) for _ in range(options.load)]
    for process in load:
        process.start()
    slow, found = planted(options.artifact, options.work, options.slow_down)
    print(f"planted: decode takes {found:+.1%} CPU time", flush=True)
    record = []
    settings = LatencyOptions(baseline=options.artifact, seconds=options.seconds, contexts=(options.context,))
    outcomes: dict[str, list[int]] = {"planted": [], "identical": []}
    for turn in range(options.runs):
        for name, candidate in (("planted", slow), ("identical", options.artifact)):
            start = time.perf_counter()
            verdict = judge_latency(get_target("onnx"), candidate, settings, lambda *_: None)
            outcomes[name].append(exit_code([verdict]))
            took = time.perf_counter() - start
            busy = psutil.getloadavg()[0]
            print(f"{turn} {name} {took:.0f} s, load {busy:.1f}: {verdict.status}: {verdict.summary}", flush=True)
            record.append({"name": name, "series": compact(verdict.figures["samples"])})
            if options.record:
                options.record.write_text(json.dumps({"machine": describe(), "unit": UNIT, "runs": record}))
    for process in load:
        process.terminate()
    caught, passed = outcomes["planted"].count(6), outcomes["identical"].count(0)
    print(f"planted: exit code 6 in {caught} of {options.runs}; identical: passed in {passed} of {options.runs}")


if __name__ == "__main__":
    main()
