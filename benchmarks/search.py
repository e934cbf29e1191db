"""A search against the commands that were there before it, and against chance: `python benchmarks/search.py`.

All three have the same text, the same windows and as many true evaluations. Each offers the front of what it measured
on the text of the search; hypervolume is that of these fronts on held-out text. Commands are all policies at all
budgets with all presets and allocations of `auto`, in an order that covers the grid evenly; chance draws every gene
anew.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pages
from arguments import add_flags
from machine import describe

from moec import passes
from moec.compiler.common import markdown
from moec.compiler.common.errors import UsageError
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.search.archive import Archive, Individual
from moec.compiler.search.seeds import allocated_formats, layer_losses
from moec.compiler.search.session import Finished, Opened, open_search, run_search
from moec.compiler.search.settings import make_settings
from moec.compiler.search.store import Measured
from moec.compiler.search.truth import MOST, surrogate_facts
from moec.compiler.search.variant import Variant
from moec.compiler.text.corpus import held_out_text
from moec.compiler.text.perplexity import increase_interval, losses
from moec.passes.routing.calibrate.fit import fit
from moec.passes.routing.compensation import CompensateDropped
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.per_layer import PerLayer, in_layer

MODEL = Path(__file__).resolve().parents[1] / "golden_models" / "olmoe-tiny"
OBJECTIVES = "perplexity,expert-flops,size"
POLICIES = ("threshold", "top-p", "capped", "layer-k", "ratio", "entropy", "margin", "uniform-k")
BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
PRESETS = ("fp16", "int8:128", "int4:128", "int4:32")
EXACT = 1e-3
"""Difference of logits that tells a wrong evaluation from another order of sums."""


def silent(*_: Any) -> None:
    """Shows nothing."""


class Stranger:
    """Individuals of other origin than the search, in an archive of their own: numbers stand for variants."""

    def __init__(self, found: Opened, variants: Sequence[Variant], archive: Archive) -> None:
        self.variants = variants
        self.archive = Archive(self, found.costs, archive.reference, archive.objectives, {})
        for number, variant in enumerate(variants):
            sections = variant.sections(found.evaluator.parts)
            measured = found.evaluator.evaluate(sections, 0, len(found.evaluator.windows))
            self.archive.add((number,), measured, 0, None)

    def variant(self, genome: np.ndarray) -> Variant:
        return self.variants[int(genome[0])]


def commands(found: Opened, finished: Finished, count: int) -> list[Variant]:
    """What `moec export` offers, in an order in which any number of them covers the grid."""
    space, parts = found.space, found.evaluator.parts
    measured = layer_losses(space, finished.search.sensitivities)
    unchanged = Variant.unchanged(found.evaluator.program, parts)
    stored = [tuple(_preset(part.name, text) for part in parts) for text in PRESETS]
    stored += [space.variant(g).formats for g in allocated_formats(space, found.costs, finished.search.sensitivities)]
    routed: list[Variant] = []
    for budget, name in itertools.product(BUDGETS, POLICIES):
        try:
            chosen = fit(name, found.traces, budget, measured)
        except UsageError:
            continue
        routed.append(replace(unchanged, policies=tuple(in_layer(chosen, i) for i in range(len(space.slots)))))
    grid = [replace(one, formats=formats) for one, formats in itertools.product(routed, stored)]
    order = np.random.default_rng(0).permutation(len(grid))
    return list(dict.fromkeys(grid[index] for index in order))[:count]


def _preset(part: str, text: str) -> str:
    """Presets of 4 bits leave embedding and head 8."""
    return text.replace("int4", "int8") if part in ("embedding", "lm_head") else text


def chance(found: Opened, count: int, seed: int) -> Iterator[Variant]:
    """Every gene anew, within its bounds."""
    random, space = np.random.default_rng([seed, 2]), found.space
    for _ in range(count):
        yield space.variant(space.canonical(random.integers(space.low, space.high + 1)))


def on_held_out(finished: Finished, found: Opened, held: Any, space: Any, front: Sequence[Individual]) -> np.ndarray:
    """Objectives of a front on held-out text, with the upper end of the interval of perplexity: [n, m + 1]."""
    reference = held.evaluate({}, 0, len(held.windows))
    rows = np.array([finished.search.archive.row(item.values) for item in front])
    best = finished.search.volume.best(np.zeros((0, rows.shape[1])), rows, MOST)
    judged = Archive(space, found.costs, reference, finished.search.archive.objectives, {})
    result = []
    for index, _ in best:
        key = front[index].genome
        measured: Measured = held.evaluate(
            space.variant(np.array(key)).sections(found.evaluator.parts), 0, len(held.windows)
        )
        high = increase_interval(judged.differences(measured))[1]
        result.append([*judged.row(judged.values(key, measured)), high])
    return np.array(result)


def cost_of_evaluations(found: Opened, finished: Finished, count: int) -> tuple[float, float, float]:
    """Seconds of an incremental evaluation, of a plain run of the same windows, and the mean of their ratios.

    The last individuals that the search measured are run again, in the order in which it ran them and in alternation
    with what perplexity took before: passes that make the Program are not counted, its run window by window is.
    """
    evaluator, windows = found.evaluator, found.evaluator.windows
    measured = sorted(list(finished.search.archive.found)[-count:])
    pairs = []
    evaluator.use_codes()
    evaluator.evaluate({}, 0, len(windows))
    for key in measured:
        variant = found.space.variant(np.array(key))
        start = time.process_time()
        fast = evaluator.evaluate(variant.sections(evaluator.parts), 0, len(windows))
        middle = time.process_time()
        runner = ProgramRunner(_program(found, variant))
        runner.prefill(windows[:1])  # weights are read and rounded once in either case
        begin = time.process_time()
        plain = losses(runner, windows)
        pairs.append((middle - start, time.process_time() - begin))
        assert np.abs(plain - np.array(fast.losses)).max() < EXACT
    taken = np.array(pairs)
    return float(taken[:, 0].mean()), float(taken[:, 1].mean()), float((taken[:, 0] / taken[:, 1]).mean())


def _program(found: Opened, variant: Variant) -> Any:
    """The Program of a variant."""
    done = [item.name for item in passes.default_passes()]
    compensations = found.evaluator.compensations
    added = [None if own is None else compensations.of(layer, own) for layer, own in enumerate(variant.policies)]
    steps = [DynamicRouting(PerLayer(layers=variant.policies)), CompensateDropped(tuple(added))]
    program, _ = passes.run_passes(found.evaluator.program, steps, completed=done)
    return program.replace(weights=program.weights.with_tensors(found.evaluator.runner.weights_of(variant)))


def one_seed(arguments: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """All figures of one seed."""
    settings = make_settings(
        {
            "checkpoint": arguments.checkpoint,
            "target": "onnx",
            "objectives": OBJECTIVES,
            "population": arguments.population,
            "generations": arguments.generations,
            "windows": arguments.windows,
            "seed": seed,
        }
    )
    found = open_search(settings, folder / f"seed-{seed}", silent)
    started = time.perf_counter()
    finished = run_search(found, folder / f"seed-{seed}", executor="local", jobs=1, store=folder, progress=silent)
    seconds = time.perf_counter() - started
    archive, volume = finished.search.archive, finished.search.volume
    count = len(archive.found)
    held = found.evaluator.on(held_out_text(None), arguments.held_out_windows)
    before = Stranger(found, commands(found, finished, count), archive)
    random = Stranger(found, list(chance(found, count, seed)), archive)
    fronts = {
        "search": on_held_out(finished, found, held, found.space, archive.front),
        "commands": on_held_out(finished, found, held, before, before.archive.front),
        "chance": on_held_out(finished, found, held, random, random.archive.front),
    }
    volumes = {name: volume.of(rows[:, :-1]) for name, rows in fronts.items()}
    fast, plain, ratio = cost_of_evaluations(found, finished, arguments.timed)
    surrogate = surrogate_facts(finished)
    least = {name: min((row[1] for row in rows if row[-1] <= 0.01), default=1.0) for name, rows in fronts.items()}
    return {
        "individuals": float(len(finished.search.seen)),
        "true evaluations": float(count),
        "share of them": count / len(finished.search.seen),
        "seconds of the search": seconds,
        **{f"hypervolume, {name}": value for name, value in volumes.items()},
        "search / commands": volumes["search"] / volumes["commands"],
        "search / chance": volumes["search"] / max(volumes["chance"], 1e-9),
        "rank correlation": float("nan") if surrogate.rank_correlation is None else surrogate.rank_correlation,
        **{f"least expert FLOPs within 1 %, {name}": value for name, value in least.items()},
        "evaluation, CPU s": fast,
        "plain perplexity, CPU s": plain,
        "evaluation / plain": ratio,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(
        parser,
        checkpoint=str(MODEL),
        population=64,
        generations=12,
        seeds=1,
        windows=32,
        held_out_windows=48,
        timed=10,
        page="",
        folder="",
    )
    arguments = parser.parse_args()
    about = describe()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        rows = [one_seed(arguments, seed, folder) for seed in range(arguments.seeds)]
    table = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        mean = float(np.mean(values))
        draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        table.append([name, f"{mean:.4g}", f"[{low:.4g}, {high:.4g}]" if len(values) > 1 else ""])
    header = ["", f"mean of {len(rows)} seeds", "95 %"]
    text = f"{markdown.table(header, table)}\n\n{about}"
    print(text)
    if arguments.page:
        pages.put(text, Path(arguments.page))


if __name__ == "__main__":
    main()
