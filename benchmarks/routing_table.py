"""Table of all routing policies at all budgets on held-out text: `python benchmarks/routing_table.py`.

Policies are calibrated on the calibration text and evaluated on the held-out texts. Perplexity is computed with the
interpreter, which runs the same Program that targets lower. Results of single runs are cached, so that an interrupted
run can be resumed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pages
import torch

from moec import passes
from moec.compiler.common import markdown
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.text.corpus import read_text, tokenize, windows
from moec.compiler.text.perplexity import RESAMPLES
from moec.passes.routing.calibrate.collect import Collector, collect, measure_sensitivities
from moec.passes.routing.calibrate.fit import fit
from moec.passes.routing.calibrate.traces import kept_share, replay
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.base import Policy
from moec.passes.routing.policies.per_layer import PerLayer
from moec.passes.routing.policies.table import BUILT_IN, parameters_of
from moec.passes.routing.policies.top_p import TopP

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "golden_models" / "olmoe-tiny"
LENGTH = 256
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
GOAL, MARGIN = 0.70, 0.02
"""Maximum share of slots to keep, and by how much the budget on calibration text is lower."""
TEXTS = {
    "kjv": ("heldout_kjv.txt", 48, 96),
    "python": ("heldout_python.txt", 0, 24),
    "austen": ("heldout_austen.txt", 0, 24),
}
"""Text -> file, first window, number of windows. The first 48 windows of kjv were used to develop the policies."""
FRESH = "kjv, fresh"
FRESH_WINDOWS = ("heldout_kjv.txt", 144, 96)
"""Windows that were used for the verdict only, never to make a choice."""


def judge(program: Program, texts: dict[str, np.ndarray]) -> dict[str, Any]:
    """Text -> loss of every window, and share of the slots that are executed."""
    found: dict[str, Any] = {}
    for name, chosen in texts.items():
        collector, losses = Collector(program), list[float]()

        def score(ids: np.ndarray, logits: np.ndarray, losses: list[float] = losses) -> None:
            predicted, wanted = torch.from_numpy(logits)[:, :-1], torch.from_numpy(ids)[:, 1:]
            each = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), reduction="none")
            losses.extend(each.double().view(len(ids), -1).mean(1).tolist())

        collector.run(chosen, judge=score)
        live = [float((trace.weights != 0).double().mean()) for trace in collector.traces()]
        found[name] = {"losses": losses, "kept": float(np.mean(live)), "kept_per_layer": live}
    return found


def increase(losses: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Relative increase of perplexity with its paired bootstrap 95 % interval over windows."""
    difference = losses - reference
    draws = np.random.default_rng(0).integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.quantile(np.exp(difference[draws].mean(1)) - 1, [0.025, 0.975])
    return float(np.exp(difference.mean()) - 1), float(low), float(high)


def jobs(traces: list[Any], sensitivities: Any) -> dict[str, Policy]:
    """All policies at all budgets, and those of the verdict at its goal, calibrated on the calibration text."""
    made: dict[str, Policy] = {}
    for kind in (kind for kind in BUILT_IN if kind is not PerLayer):
        for budget in BUDGETS:
            made[f"{kind.name} {budget:.2f}"] = fit(kind.name, traces, budget, sensitivities)
    top_k = traces[0].weights.shape[1]
    for k in range(1, top_k):
        made[f"uniform-k k={k}"] = fit("uniform-k", traces, k / top_k)
    goal = GOAL - MARGIN
    made[f"top-p-plain {goal:.2f}"] = fit(TopP.name, traces, goal)
    for name in (TopP.name, "threshold", "random-drop"):
        made[f"{name} {goal:.2f}"] = fit(name, traces, goal, sensitivities)
    return made


def in_verdict(name: str) -> bool:
    """Whether the verdict needs this run on the fresh windows."""
    return name == "off" or "k=" in name or name.endswith(f"{GOAL - MARGIN:.2f}")


def measure(cache: Path) -> dict[str, Any]:
    """Evaluate all policies; results in the cache are reused."""
    checkpoint = Checkpoint.open(MODEL)
    program, _ = passes.run_passes(capture(checkpoint), passes.default_passes())
    every = windows(tokenize(MODEL, read_text()), LENGTH)
    # The text concatenates several sources, so windows are taken from all parts of it.
    chosen = every[:: max(1, len(every) // 64)][:64]
    traces = collect(program, chosen)
    sensitivities = measure_sensitivities(program, chosen[::8])
    texts = {
        name: windows(tokenize(MODEL, read_text(MODEL / "texts" / file)), LENGTH, count, start=first)
        for name, (file, first, count) in {**TEXTS, FRESH: FRESH_WINDOWS}.items()
    }
    results: dict[str, Any] = json.loads(cache.read_text()) if cache.is_file() else {}
    layers = replay(traces)
    wanted: dict[str, Policy | None] = {"off": None, **jobs(traces, sensitivities)}
    for name, policy in wanted.items():
        parameters = None if policy is None else json.loads(json.dumps(parameters_of(policy)))
        if results.get(name, {}).get("parameters", parameters) != parameters:
            del results[name]
        found = results.setdefault(name, {"parameters": parameters})
        found["calibration_kept"] = 1.0 if policy is None else kept_share(policy, layers)
        missing = {
            text: ids for text, ids in texts.items() if text not in found and (text != FRESH or in_verdict(name))
        }
        if missing:
            routed = program if policy is None else DynamicRouting(policy).run(program).program
            found |= judge(routed, missing)
            cache.write_text(json.dumps(results))
            print(f"{name}: kept {found['kjv']['kept']:.3f}", flush=True)
    return {name: results[name] for name in wanted}


def row(name: str, found: dict[str, Any], off: dict[str, Any]) -> list[str]:
    """One row of the table."""
    policy, budget = name.split()
    cells = [policy, budget, f"{found['calibration_kept']:.1%}", f"{found['kjv']['kept']:.1%}"]
    for text in TEXTS:
        mean, low, high = increase(np.array(found[text]["losses"]), np.array(off[text]["losses"]))
        cells.append(f"{mean:+.2%} [{low:+.2%}, {high:+.2%}]")
    return cells


def interpolated(results: dict[str, Any], kept: float, text: str) -> np.ndarray:
    """Loss of uniform-k per window at a kept share, interpolated between integer numbers of experts."""
    points = {
        found[text]["kept"]: found[text]["losses"] for name, found in results.items() if name.startswith("uniform-k k=")
    }
    points[results["off"][text]["kept"]] = results["off"][text]["losses"]
    shares = sorted(points)
    table = np.array([points[share] for share in shares])
    return np.array([np.interp(kept, shares, column) for column in table.T])


def verdict(results: dict[str, Any]) -> str:
    """The second table: the goal on fresh windows, against uniform-k at the same FLOPs and random-drop."""
    goal = f"{GOAL - MARGIN:.2f}"
    off = np.array(results["off"][FRESH]["losses"])
    drop = results[f"random-drop {goal}"][FRESH]
    dropped = float((np.array(drop["losses"]) - off).mean())
    header = ["policy", "expert FLOPs not executed", "perplexity", "against uniform-k at the same FLOPs", "loss, nats"]
    lines = []
    for name in (f"top-p-plain {goal}", f"top-p {goal}", f"threshold {goal}"):
        found = results[name][FRESH]
        losses = np.array(found["losses"])
        mean, low, high = increase(losses, off)
        better, least, most = increase(losses, interpolated(results, found["kept"], FRESH))
        cells = [
            name.split()[0],
            f"{1 - found['kept']:.1%}",
            f"{mean:+.2%} [{low:+.2%}, {high:+.2%}]",
            f"{better:+.2%} [{least:+.2%}, {most:+.2%}]",
            f"{float((losses - off).mean()):+.4f}",
        ]
        lines.append(cells)
    mean, low, high = increase(np.array(drop["losses"]), off)
    cells = ["random-drop", f"{1 - drop['kept']:.1%}", f"{mean:+.2%} [{low:+.2%}, {high:+.2%}]", "", f"{dropped:+.4f}"]
    return markdown.table(header, [*lines, cells])


def table(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    header = [
        "policy",
        "budget",
        "kept, calibration",
        "executed FLOPs, kjv",
        *(f"perplexity, {text}" for text in TEXTS),
    ]
    rows = [row(name, found, results["off"]) for name, found in results.items() if name != "off" and "k=" not in name]
    return f"{markdown.table(header, rows)}\n\n{verdict(results)}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "routing.md", help="page whose table is replaced"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "benchmarks" / "routing_table.json", help="cache of single runs"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = table(measure(arguments.cache))
    pages.put(text, arguments.output)


if __name__ == "__main__":
    main()
